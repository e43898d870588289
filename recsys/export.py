"""The encoder as an ONNX graph: from one padded window to the state that is compared with the item
table. The table product and the top-k stay outside of the graph.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from recsys.catalogue import MASK, NUM_SPECIAL, PAD
from recsys.errors import ArtifactError
from recsys.model import NextItemModel

MODEL_FILE = "model.onnx"
_INPUT_NAMES = ("items", "context", "request", "seconds")
_MAX_INLINE_BYTES = 1_500_000_000
"""An ONNX file ends at 2 GB; larger weights go into a second file beside it."""


class LastState(nn.Module):
    """`NextItemModel` up to the state at the last position, `[B, D]`."""

    def __init__(self, model: NextItemModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, items_BL: Tensor, context_BLF: Tensor, request_BLF: Tensor, seconds_BL2: Tensor
    ) -> Tensor:
        last_BD: Tensor = self.model(items_BL, context_BLF, request_BLF, seconds_BL2)[:, -1]
        return last_BD


class OnnxEncoder:
    """An exported encoder under ONNX Runtime. Raises ArtifactError when there is none."""

    def __init__(self, path: Path, max_len: int) -> None:
        if not path.is_file():
            raise ArtifactError(
                f"{path} does not exist; publish the version with its export, or use torch."
            )
        options = onnxruntime.SessionOptions()
        # Ray gives each replica its share of the cores through this one number.
        options.intra_op_num_threads = torch.get_num_threads()
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        available = onnxruntime.get_available_providers()
        self._session = onnxruntime.InferenceSession(
            path, options, providers=[name for name in wanted if name in available]
        )
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._max_len = max_len

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As `LastState.forward`, for windows of any length up to `max_len`."""
        padded = _pad_left(inputs, self._max_len)
        # A graph has only the inputs that the model reads: a bidirectional one takes no request.
        arrays = dict(zip(_INPUT_NAMES, (tensor.cpu().numpy() for tensor in padded), strict=True))
        (hidden_BD,) = self._session.run(None, {name: arrays[name] for name in self._inputs})
        return torch.from_numpy(hidden_BD).to(inputs[0].device)


@dataclass(frozen=True)
class Parity:
    """How far an export is from its model."""

    overlap: float
    """Mean share of the top ten that both have."""
    max_difference: float
    """Largest difference between two scores of one item."""


def export_onnx(model: NextItemModel, path: Path) -> None:
    """Writes the encoder of a CPU model for windows of `max_len` positions, left-padded, and any
    batch size. Items are looked up in one table, or by their codes, whatever attributes they have.
    """
    model = model.materialised()
    example = sample_inputs(model, num_windows=2, seed=0)
    batch = torch.export.Dim("batch", min=1, max=4096)
    size = sum(parameter.nbytes for parameter in model.parameters())
    # The fused attention kernels promise strides that their decomposition does not keep.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # The exporter's own calls are deprecated by the libraries below it.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LastState(model).eval(),
            example,
            path,
            input_names=list(_INPUT_NAMES),
            output_names=["hidden"],
            dynamo=True,
            dynamic_shapes=({0: batch},) * len(_INPUT_NAMES),
            external_data=size > _MAX_INLINE_BYTES,
            verbose=False,
        )


@torch.no_grad()
def parity(model: NextItemModel, path: Path, *, num_windows: int = 64, seed: int = 0) -> Parity:
    """Compares an export with its model on random windows of every length."""
    model = model.eval()
    inputs = sample_inputs(model, num_windows=num_windows, seed=seed)
    expected_BI = model.scores(LastState(model).eval()(*inputs))
    exported_BI = model.scores(OnnxEncoder(path, model.config.max_len)(*inputs))

    k = min(10, expected_BI.shape[1])
    is_shared = expected_BI.topk(k).indices[:, :, None] == exported_BI.topk(k).indices[:, None, :]
    is_finite = expected_BI.isfinite()
    difference = (expected_BI - exported_BI)[is_finite].abs().max()
    return Parity(float(is_shared.any(2).float().mean()), float(difference))


def sample_inputs(
    model: NextItemModel, *, num_windows: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random inputs of `NextItemModel.forward`, left-padded to `max_len`, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    L, num_rows = model.config.max_len, len(model.item_bias)
    lengths_B1 = torch.randint(1, L + 1, (num_windows, 1), generator=generator)
    is_token_BL = torch.arange(L) >= L - lengths_B1
    items_BL = torch.randint(NUM_SPECIAL, num_rows, (num_windows, L), generator=generator)
    if model.config.attention == "bidirectional":
        items_BL[:, -1] = MASK

    sizes = _context_sizes(model)
    codes_BLF = torch.rand(num_windows, L, len(sizes), generator=generator) * torch.tensor(sizes)
    context_BLF = codes_BLF.long().masked_fill(~is_token_BL[..., None], 0)
    request_BLF = context_BLF if model.request is not None else torch.zeros_like(context_BLF)
    seconds_BL = torch.randint(1, 10**7, (num_windows, L), generator=generator).cumsum(1)
    seconds_BL = seconds_BL.int().masked_fill(~is_token_BL, 0)
    items_BL = items_BL.masked_fill(~is_token_BL, PAD)
    return items_BL, context_BLF, request_BLF, seconds_BL[..., None].expand(-1, -1, 2).contiguous()


def _context_sizes(model: NextItemModel) -> list[int]:
    if model.context is None:
        return []
    starts_F = model.context.get_buffer("starts_F").tolist()
    ends_F = [*starts_F[1:], model.context.table.num_embeddings]
    return [end - start for start, end in zip(starts_F, ends_F, strict=True)]


def _pad_left(inputs: Sequence[Tensor], max_len: int) -> list[Tensor]:
    # Zero is padding for items and unknown for context.
    missing = max_len - inputs[0].shape[1]
    return [F.pad(tensor, (0,) * (2 * (tensor.ndim - 2)) + (missing, 0)) for tensor in inputs]
