"""Blocks of the encoder: attention, which may know of distances and times, and the feed-forward net
that follows it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.model_config import ModelConfig
from recsys.packing import Packed, attend_packed
from recsys.randomness import Noise

_NUM_AGES = 80
"""Steps of the logarithm of a time; 80 reach beyond 900 years."""


class Seen(NamedTuple):
    """What stands between each two positions, the same for every block."""

    hidden_B1LL: Tensor
    """0 where a position (row) may look, -inf where it may not."""
    distances_LL: Tensor
    """Rows of `Block.distances`: from the furthest position ahead to the furthest behind."""
    ages_BLL: Tensor | None
    """Rows of `Block.ages`, see `bucket_ages`; None where no block reads times."""


def bucket_ages(asked_BL: Tensor, happened_BL: Tensor) -> Tensor:
    """How long before the moments `asked` each event happened, as rows of a table, `[B, L, L]`.

    `floor(ln(seconds) / 0.301)`, as HSTU has it, counted apart for events that lie ahead. Row 0
    stands for an unknown time.

    Args:
        asked_BL: int, seconds from any origin, 0 where unknown.
        happened_BL: the same of the events.
    """
    passed_BLL = asked_BL[:, :, None] - happened_BL[:, None, :]
    steps_BLL = passed_BLL.abs().clamp(min=1).float().log().div(0.301).int() + 1
    rows_BLL = steps_BLL.clamp(max=_NUM_AGES - 1) + _NUM_AGES * (passed_BLL < 0)
    is_known_BLL = (asked_BL != 0)[:, :, None] & (happened_BL != 0)[:, None, :]
    return rows_BLL * is_known_BLL


class Dropout(nn.Module):
    """Dropout by the step's own noise: a byte a value, the probability rounded to a 256th. Where
    there is no noise it is torch's.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if noise is None:
            return F.dropout(x, self.p)
        num_dropped = round(self.p * 256)
        # In the dtype of the values: a product of two dtypes takes several times as long.
        kept = (noise.bytes_like(x) >= num_dropped).to(x.dtype)
        return x * kept.mul_(256 / (256 - num_dropped))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a feed-forward net four times as wide."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        self.dropout = Dropout(config.dropout)
        distances = 2 * config.max_len - 1
        self.distances = nn.Embedding(distances, config.num_heads) if config.relative_bias else None
        self.ages = nn.Embedding(2 * _NUM_AGES, config.num_heads) if config.time_bias else None

    def forward(
        self,
        x_BLD: Tensor,
        seen: Seen | Packed,
        noise: Noise | None,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """States `[B, L, D]`, or `[T, D]` of a packed batch; with `rows_M`, flat indices into these
        positions, those of few alone, `[M, D]`: all are attended to, and what follows is computed
        for few.
        """
        mixed_BLD = self._attend(self.norm_attention(x_BLD), seen)
        if rows_M is None:
            return self._add(x_BLD, mixed_BLD, noise)
        x_MD = x_BLD.flatten(0, -2).index_select(0, rows_M)
        mixed_MD = mixed_BLD.flatten(0, -2).index_select(0, rows_M)
        return self._add(x_MD, mixed_MD, None if noise is None else noise.at(rows_M))

    def _add(self, x: Tensor, mixed: Tensor, noise: Noise | None) -> Tensor:
        """What attention mixed and the feed-forward net add to states `[..., D]`."""
        x = x + self.dropout(self.project(mixed), noise)
        wide = F.gelu(self.widen(self.norm_mlp(x)))
        added: Tensor = x + self.dropout(self.narrow(wide), noise)
        return added

    def _attend(self, x_BLD: Tensor, seen: Seen | Packed) -> Tensor:
        if isinstance(seen, Packed):
            return self._attend_packed(x_BLD, seen)
        B, L, D = x_BLD.shape
        qkv = self.qkv(x_BLD).view(B, L, 3, self.num_heads, D // self.num_heads)
        q_BHLd, k_BHLd, v_BHLd = qkv.permute(2, 0, 3, 1, 4)

        mixed_BHLd = attend(q_BHLd, k_BHLd, v_BHLd, self._bias(seen, q_BHLd.dtype))
        return mixed_BHLd.transpose(1, 2).reshape(B, L, D)

    def _attend_packed(self, x_TD: Tensor, packed: Packed) -> Tensor:
        T, D = x_TD.shape
        qkv = self.qkv(x_TD).view(T, 3, self.num_heads, D // self.num_heads)
        q_THd, k_THd, v_THd = qkv.unbind(1)
        return attend_packed(q_THd, k_THd, v_THd, packed).reshape(T, D)

    def _bias(self, seen: Seen, dtype: torch.dtype) -> Tensor:
        bias_BHLL = seen.hidden_B1LL.to(dtype)
        if self.distances is not None:
            bias_BHLL = bias_BHLL + self.distances(seen.distances_LL).permute(2, 0, 1).to(dtype)
        if self.ages is not None:
            bias_BHLL = bias_BHLL + self.ages.weight.to(dtype)[seen.ages_BLL].permute(0, 3, 1, 2)
        return bias_BHLL


def attend(q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, bias_BHLL: Tensor) -> Tensor:
    """Attention with an additive bias, `[B, H, L, d]`."""
    if q_BHLd.is_cuda:
        return F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, attn_mask=bias_BHLL)
    # At these lengths two products and a softmax take half the time of the fused kernel of a CPU.
    scores_BHLL = (q_BHLd * q_BHLd.shape[-1] ** -0.5) @ k_BHLd.transpose(-1, -2) + bias_BHLL
    return torch.softmax(scores_BHLL, dim=-1) @ v_BHLd


class GatedBlock(Block):
    """LiGR: what attention and the feed-forward net (SwiGLU) add passes a gate that reads their
    input (Borisyuk et al., 2025, arXiv:2502.03417), as in eSASRec (Tikhonovich et al., 2025).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.widen = nn.Linear(dim, 2 * 4 * dim)
        self.gate_attention = nn.Linear(dim, dim)
        self.gate_mlp = nn.Linear(dim, dim)

    def _add(self, x: Tensor, mixed: Tensor, noise: Noise | None) -> Tensor:
        attended = self.dropout(self.project(mixed), noise)
        x = x + torch.sigmoid(self.gate_attention(x)) * attended

        gate, value = self.widen(self.norm_mlp(x)).chunk(2, dim=-1)
        narrow = self.dropout(self.narrow(F.silu(gate) * value), noise)
        added: Tensor = x + torch.sigmoid(self.gate_mlp(x)) * narrow
        return added


BLOCKS = {"transformer": Block, "ligr": GatedBlock}
