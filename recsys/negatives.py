"""Negatives for the losses that do not look at the whole catalogue: which items, and how often each
was to be expected, which is what a sampled softmax corrects for.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL


class NegativesConfig(BaseModel):
    """Where negatives come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["uniform", "popularity", "in-batch", "mixed"] = "uniform"
    """uniform: any item alike; popularity: by training events; in-batch: the targets of the batch
    (Hidasi et al., 2016); mixed: uniform ones and the targets of the batch (Yang et al., 2020)."""
    num: int = Field(256, ge=1)
    """Drawn negatives, beside those that the batch brings."""
    group_size: int | None = Field(None, ge=1)
    """About so many consecutive scored positions share a draw, None: all of the batch. Smaller
    groups give a quieter gradient and cost more vectors: with one draw a batch a sampled softmax
    learns more slowly, and binary losses hardly start."""

    @model_validator(mode="after")
    def _fits(self) -> "NegativesConfig":
        if self.group_size is not None and self.source in ("in-batch", "mixed"):
            raise ValueError(f"{self.source} negatives belong to the batch; leave out group_size")
        return self


@dataclass(frozen=True)
class Negatives:
    """N negatives for each of G groups of consecutive positions, the last of which may be short."""

    items_GN: Tensor
    log_expected_GN: Tensor
    """Logarithm of how often an item is expected among the N."""

    @property
    def num(self) -> int:
        return self.items_GN.shape[1]

    def per_position(self, values_GN: Tensor, num_positions: int) -> Tensor:
        """The values of each position's group, `[M, N]`."""
        group_size = -(-num_positions // max(1, len(values_GN)))
        return values_GN.repeat_interleave(group_size, 0)[:num_positions]


class NegativeSampler:
    """Draws the negatives of a batch.

    Args:
        counts_I: training events of each row of the item table, int64.
    """

    def __init__(self, config: NegativesConfig, counts_I: Tensor) -> None:
        self.config = config
        counts_I = counts_I.double()
        counts_I[:NUM_SPECIAL] = 0
        self._share_I = (counts_I / counts_I.sum().clamp(min=1)).float()
        self._sums_I = counts_I.cumsum(0)
        # A uniform sample stands for the items that are not the target.
        self._num_others = max(1, len(counts_I) - NUM_SPECIAL - 1)

    def draw(self, targets_M: Tensor, generator: torch.Generator) -> Negatives:
        """Negatives for these positions; one may equal a target, and counts as none there."""
        source, num = self.config.source, self.config.num
        num_groups = -(-len(targets_M) // (self.config.group_size or max(1, len(targets_M))))
        shape = (num_groups, num)
        if source == "uniform":
            items = self._uniform(shape, generator)
            return Negatives(items, torch.log(self._expected_uniform(items)))
        if source == "popularity":
            items = self._popular(shape, generator)
            return Negatives(items, torch.log(num * self._share_I[items]))
        expected_in_batch = len(targets_M) * self._share_I
        if source == "in-batch":
            items = targets_M[None]
            return Negatives(items, torch.log(expected_in_batch[items]))
        items = torch.cat([self._uniform((1, num), generator), targets_M[None]], dim=1)
        expected = self._expected_uniform(items) + expected_in_batch[items]
        return Negatives(items, torch.log(expected))

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        num_rows, device = len(self._share_I), self._share_I.device
        return torch.randint(NUM_SPECIAL, num_rows, shape, generator=generator, device=device)

    def _expected_uniform(self, items: Tensor) -> Tensor:
        expected = self.config.num / self._num_others
        return torch.full(items.shape, expected, device=items.device)

    def _popular(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # By inversion: torch.multinomial takes no more than 2^24 items.
        uniform = torch.rand(
            shape, generator=generator, device=self._sums_I.device, dtype=torch.float64
        )
        drawn = torch.searchsorted(self._sums_I, uniform * self._sums_I[-1], right=True)
        return drawn.clamp(NUM_SPECIAL, len(self._sums_I) - 1)
