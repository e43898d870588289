"""The encoder as an ONNX graph: from a window of any length to the state that is compared with the
item table, in fp32 or in smaller numbers. The table product and the top-k stay outside of the
graph.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from recsys.catalogue import MASK, NUM_SPECIAL, PAD
from recsys.encoders import INPUT_NAMES, Encoder, LastState, Variant, variant_file
from recsys.model import NextItemModel

_MAX_INLINE_BYTES = 1_500_000_000
"""An ONNX file ends at 2 GB; larger weights go into a second file beside it."""
_MAX_SCORES = 2**26


@dataclass(frozen=True)
class Parity:
    """How far an encoder is from its model."""

    overlap: float
    """Mean share of the top ten that both have."""
    max_difference: float
    """Largest difference between two scores of one item."""


def export_onnx(model: NextItemModel, path: Path) -> None:
    """Writes the encoder of a CPU model for any batch size and windows of up to `max_len`
    positions. Items are looked up in one table, or by their codes, whatever attributes they have.
    """
    model = model.materialised()
    example = sample_inputs(model, num_windows=2, seed=0)
    batch = torch.export.Dim("batch", min=1, max=4096)
    length = torch.export.Dim("length", min=1, max=model.config.max_len)
    # The fused attention kernels promise strides that their decomposition does not keep.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # The exporter's own calls are deprecated by the libraries below it.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LastState(model).eval(),
            example,
            path,
            input_names=list(INPUT_NAMES),
            output_names=["hidden"],
            dynamo=True,
            dynamic_shapes=({0: batch, 1: length},) * len(INPUT_NAMES),
            external_data=_is_large(model),
            verbose=False,
        )


def export_variant(model: NextItemModel, variant: Variant, folder: Path) -> Path | None:
    """Writes one variant; int8 is made of the fp32 that lies there already. bf16 has no file: it is
    the model itself under torch.
    """
    path = folder / variant_file(variant)
    if variant == "bf16":
        return None
    if variant == "int8":
        _quantise(folder / variant_file("fp32"), path, is_large=_is_large(model))
    else:
        model = model.materialised()
        export_onnx(copy.deepcopy(model).half() if variant == "fp16" else model, path)
    return path


@torch.no_grad()
def parity(
    model: NextItemModel, encode: Encoder, *, num_windows: int = 64, seed: int = 0
) -> Parity:
    """Compares an encoder with its model on random windows of every length."""
    model = model.eval()
    inputs = sample_inputs(model, num_windows=num_windows, seed=seed)
    # In parts, so that a large catalogue has few scores at a time.
    step = max(1, _MAX_SCORES // len(model.item_bias))
    shares, differences = [], []
    for start in range(0, num_windows, step):
        part = [tensor[start : start + step] for tensor in inputs]
        expected_BI = model.scores(LastState(model).eval()(*part))
        exported_BI = model.scores(encode(*part))
        k = min(10, expected_BI.shape[1])
        tops = (scores_BI.topk(k).indices for scores_BI in (expected_BI, exported_BI))
        shares.append((next(tops)[:, :, None] == next(tops)[:, None, :]).any(2).float().mean(1))
        is_finite = expected_BI.isfinite()
        differences.append((expected_BI - exported_BI)[is_finite].abs().max())
    return Parity(float(torch.cat(shares).mean()), float(torch.stack(differences).max()))


def _quantise(source: Path, path: Path, *, is_large: bool) -> None:
    """Weights of matrix products in int8, a scale for each column; what they are multiplied with is
    rounded when it is known.
    """
    # The exporter leaves shapes of weights that it has transposed since; they are inferred again.
    graph = onnx.load(source, load_external_data=False)
    graph.graph.ClearField("value_info")
    bare = path.with_suffix(".bare")
    try:
        onnx.save(graph, bare)
        quantize_dynamic(
            bare,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large,
        )
    finally:
        bare.unlink(missing_ok=True)


def _is_large(model: NextItemModel) -> bool:
    return sum(parameter.nbytes for parameter in model.parameters()) > _MAX_INLINE_BYTES


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
