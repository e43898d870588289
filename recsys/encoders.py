"""What turns a batch of requests into the states that are compared with items: the model itself, or
its export under ONNX Runtime.
"""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail, Fail, RuntimeException
from torch import Tensor, nn

from recsys.errors import ArtifactError
from recsys.model import NextItemModel

Backend = Literal["torch", "onnx"]
Variant = Literal["fp32", "fp16", "bf16", "int8"]
Provider = Literal["cpu", "cuda", "tensorrt"]
Encoder = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From the inputs of `NextItemModel.forward` to the state at the last position, fp32 `[B, D]`."""

VARIANTS: dict[Backend, tuple[Variant, ...]] = {
    "torch": ("fp32", "bf16"),
    "onnx": ("fp32", "fp16", "int8"),
}
"""fp16 is for GPUs: a CPU computes it in fp32 and takes longer. int8 has weights of a byte, and
rounds what they are multiplied with on the way. bf16 multiplies in bf16 and adds up in fp32."""
INPUT_NAMES = ("items", "context", "request", "seconds")
LARGEST_BATCH = 512

_FALLBACKS: dict[Provider, tuple[Provider, ...]] = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "cpu"),
    "tensorrt": ("tensorrt", "cuda", "cpu"),
}
_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

log = logging.getLogger(__name__)


def variant_file(variant: Variant) -> str:
    """Name of an exported encoder inside an artifact."""
    return "model.onnx" if variant == "fp32" else f"model.{variant}.onnx"


def make_encoder(
    model: NextItemModel, folder: Path, *, backend: Backend, variant: Variant, provider: Provider
) -> Encoder:
    """The encoder of a materialised model, or of the export of it in `folder`.

    Raises: ValueError when the backend lacks the variant; ArtifactError when there is no export.
    """
    if variant not in VARIANTS[backend]:
        raise ValueError(
            f"The backend {backend} has no variant {variant!r}; choose one of: "
            f"{', '.join(VARIANTS[backend])}."
        )
    if backend == "onnx":
        return OnnxEncoder(folder / variant_file(variant), model.config.max_len, provider)
    return LastState(model) if variant == "fp32" else RoundedState(model, torch.bfloat16)


class LastState(nn.Module):
    """`NextItemModel` up to the state at the last position, fp32 `[B, D]`."""

    def __init__(self, model: NextItemModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, items_BL: Tensor, context_BLF: Tensor, request_BLF: Tensor, seconds_BL2: Tensor
    ) -> Tensor:
        B, L = items_BL.shape
        last_B = torch.arange(1, B + 1, device=items_BL.device) * L - 1
        last_BD: Tensor = self.model(items_BL, context_BLF, request_BLF, seconds_BL2, rows_M=last_B)
        return last_BD.float()


class RoundedState(nn.Module):
    """`LastState` whose products are made of `dtype`; the model keeps its own weights."""

    def __init__(self, model: NextItemModel, dtype: torch.dtype) -> None:
        super().__init__()
        # Tables are looked up, not multiplied with: they are shared instead of copied.
        tables: dict[int, Any] = {id(table): table for table in (model.items, model.outputs)}
        copied = copy.deepcopy(model, tables)
        for module in copied.modules():
            if isinstance(module, nn.Linear):
                # Rounded here, autocast has nothing left to round in every call.
                module.to(dtype)
        self._last_state = LastState(copied)
        self._dtype = dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, self._dtype):
            last_BD: Tensor = self._last_state(*inputs)
        return last_BD


class OnnxEncoder:
    """An exported encoder under ONNX Runtime.

    Args:
        max_len: positions of the longest window.
        provider: what it shall run on; where that cannot be had, the next of tensorrt, cuda, cpu
            takes its place, and one logged sentence says why. `provider` is then that one.

    Raises: ArtifactError when there is no export.
    """

    def __init__(self, path: Path, max_len: int, provider: Provider = "cpu") -> None:
        if not path.is_file():
            raise ArtifactError(
                f"{path} does not exist; publish the version with its export, or use torch."
            )
        self._max_len = max_len
        self._session, self.provider = _open_session(path, max_len, provider)
        nodes = self._session.get_inputs()
        self._inputs = [node.name for node in nodes]
        # Older exports take windows of one length, and TensorRT builds an engine for each.
        self._is_padded = isinstance(nodes[0].shape[1], int) or self.provider == "tensorrt"
        self._dim = self._session.get_outputs()[0].shape[1]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As `LastState.forward`, for windows of any length up to `max_len`; the states are on the
        device of the inputs.
        """
        padded = _pad_left(inputs, self._max_len) if self._is_padded else inputs
        # A graph has only the inputs that the model reads: a bidirectional one takes no request.
        named = dict(zip(INPUT_NAMES, padded, strict=True))
        wanted = {name: named[name] for name in self._inputs}
        if inputs[0].is_cuda and self.provider != "cpu":
            return self._run_on_device(wanted)
        arrays = {name: tensor.cpu().numpy() for name, tensor in wanted.items()}
        (hidden_BD,) = self._session.run(None, arrays)
        return torch.from_numpy(hidden_BD).to(inputs[0].device)

    def _run_on_device(self, inputs: dict[str, Tensor]) -> Tensor:
        """Without a copy to the host: inputs and states are used where they lie."""
        binding = self._session.io_binding()
        held = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in held.items():
            _bind(binding.bind_input, name, tensor)
        first = next(iter(held.values()))
        hidden_BD = torch.empty(len(first), self._dim, device=first.device)
        _bind(binding.bind_output, self._session.get_outputs()[0].name, hidden_BD)
        # ONNX Runtime has a stream of its own.
        torch.cuda.current_stream(first.device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return hidden_BD


def _open_session(
    path: Path, max_len: int, wanted: Provider
) -> tuple[onnxruntime.InferenceSession, Provider]:
    """A session, and the provider that was left of those wanted."""
    reasons: list[str] = []
    for provider in _FALLBACKS[wanted]:
        session, reason = _try_provider(path, max_len, provider)
        if session is not None:
            if reasons:
                log.warning("The encoder runs on %s: %s.", provider, "; ".join(reasons))
            return session, provider
        reasons.append(reason)
    raise ArtifactError(f"{path} cannot be opened by ONNX Runtime: {'; '.join(reasons)}.")


def _try_provider(
    path: Path, max_len: int, provider: Provider
) -> tuple[onnxruntime.InferenceSession | None, str]:
    """A session, or why there is none."""
    name = _PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        return None, f"this build of ONNX Runtime has no {name}"
    options = onnxruntime.SessionOptions()
    # Ray gives each replica its share of the cores through this one number.
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait without sleeping take cores from the ingress beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[name])
        if provider == "tensorrt":
            profile = _tensorrt_profile(session, max_len)
            session = onnxruntime.InferenceSession(path, options, providers=[(name, profile)])
    except (EPFail, Fail, RuntimeException, RuntimeError) as error:
        return None, f"{name} failed: {str(error).splitlines()[0]}"
    if session.get_providers()[0] != name:
        return None, f"{name} could not be loaded"
    return session, ""


def _tensorrt_profile(session: onnxruntime.InferenceSession, max_len: int) -> dict[str, Any]:
    """One engine for all batches, instead of one for each size that comes along."""

    def shapes(batch: int) -> str:
        sizes = {
            node.name: "x".join(map(str, (batch, max_len, *node.shape[2:])))
            for node in session.get_inputs()
        }
        return ",".join(f"{name}:{size}" for name, size in sizes.items())

    return {
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": shapes(32),
        "trt_profile_max_shapes": shapes(LARGEST_BATCH),
    }


def _bind(bind: Callable[..., None], name: str, tensor: Tensor) -> None:
    kind = np.dtype(str(tensor.dtype).removeprefix("torch.")).type
    device = tensor.device
    bind(name, device.type, device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())


def _pad_left(inputs: tuple[Tensor, ...], length: int) -> tuple[Tensor, ...]:
    missing = length - inputs[0].shape[1]
    return tuple(F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (missing, 0)) for tensor in inputs)
