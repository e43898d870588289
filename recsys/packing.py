"""Batches without their padding: the tokens of all windows one after the other, for attention of
variable lengths on a GPU. On a CPU, where there is no such kernel, batches keep their padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.catalogue import PAD
from recsys.model_config import ModelConfig

_MAX_HEAD_DIM = 256
_HEAD_DIM_STEP = 8
_LEAST_CAPABILITY = (8, 0)
"""Of the kernel, FlashAttention 2: Ampere and newer."""
_UNBOUNDED = -1


class Packed(NamedTuple):
    """Where the tokens of a batch lie, the same for every block."""

    rows_T: Tensor
    """Flat indices into `[B * L]`, int64."""
    bounds_B1: Tensor
    """Tokens before each window and, at the end, of all, int32 `[B + 1]`."""
    max_len: int
    """No window has more tokens."""
    is_causal: bool


def can_pack(config: ModelConfig, x_BLD: Tensor) -> bool:
    """Whether the kernel takes what the blocks make of these states: half precision on a GPU that
    has it, and nothing that is added to the scores.
    """
    if not x_BLD.is_cuda or config.relative_bias or config.time_bias:
        return False
    is_autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if is_autocast else x_BLD.dtype
    head_dim = config.dim // config.num_heads
    return (
        dtype in (torch.bfloat16, torch.float16)
        and head_dim <= _MAX_HEAD_DIM
        and head_dim % _HEAD_DIM_STEP == 0
        and torch.cuda.get_device_capability(x_BLD.device) >= _LEAST_CAPABILITY
    )


def pack(items_BL: Tensor, scored_M: Tensor, *, is_causal: bool) -> tuple[Packed, Tensor]:
    """The tokens of a batch, and where the scored positions are among them, int64 `[M]`.

    Args:
        items_BL: left-padded. A window of padding alone keeps its positions that are scored.
        scored_M: flat indices into `[B * L]`.
    """
    is_token_BL = items_BL != PAD
    is_token_BL.view(-1)[scored_M] = True
    rows_T = is_token_BL.flatten().nonzero().squeeze(1)
    bounds_B1 = F.pad(is_token_BL.sum(1).cumsum(0), (1, 0)).int()
    places_M = (is_token_BL.flatten().cumsum(0) - 1)[scored_M]
    return Packed(rows_T, bounds_B1, items_BL.shape[1], is_causal), places_M


def attend_packed(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, packed: Packed) -> Tensor:
    """Attention of each token to those of its own window, `[T, H, d]`."""
    window = (_UNBOUNDED, 0 if packed.is_causal else _UNBOUNDED)
    mixed_THd: Tensor = _find_kernel()(
        q_THd,
        k_THd,
        v_THd,
        packed.bounds_B1,
        packed.bounds_B1,
        packed.max_len,
        packed.max_len,
        window_size=window,
    )
    return mixed_THd


def _find_kernel() -> Callable[..., Any]:
    # It is imported with a compiler, which takes seconds, and no CPU needs it.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
