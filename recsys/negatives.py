"""Negatives for the losses that do not look at the whole catalogue: which items, and how often each
was to be expected, which is what a sampled softmax corrects for.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from recsys.catalogue import NUM_SPECIAL
from recsys.randomness import Draws, Purpose, as_uniform_double


class NegativesConfig(BaseModel):
    """Where negatives come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["uniform", "popularity", "in-batch", "mixed"] = "uniform"
    """uniform: any item alike; popularity: by training events; in-batch: the targets of the batch
    (Hidasi et al., 2016); mixed: uniform ones and the targets of the batch (Yang et al., 2020)."""
    num: int = Field(256, ge=1)
    """Drawn negatives, beside those that the batch brings."""
    group_size: int | None = Field(None, ge=1)
    """So many consecutive scored positions share a draw, None: all of the batch. Smaller
    groups give a quieter gradient and cost more vectors: with one draw a batch a sampled softmax
    learns more slowly, and binary losses hardly start."""

    @model_validator(mode="after")
    def _fits(self) -> "NegativesConfig":
        if self.group_size is not None and self.source in ("in-batch", "mixed"):
            raise ValueError(f"{self.source} negatives belong to the batch; leave out group_size")
        return self


@dataclass(frozen=True)
class Negatives:
    """N negatives for each of G groups of consecutive positions."""

    items_GN: Tensor
    log_expected_GN: Tensor
    """Logarithm of how often an item is expected among the N."""
    group_size: int
    num_before: int = 0
    """Positions of the first group that are not among those at hand; the last may be short too."""

    @property
    def num(self) -> int:
        return self.items_GN.shape[1]

    def per_position(self, values_GN: Tensor, num_positions: int) -> Tensor:
        """The values of each position's group, `[M, N]`."""
        until = self.num_before + num_positions
        return values_GN.repeat_interleave(self.group_size, 0)[self.num_before : until]


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
        self._num_items = len(counts_I) - NUM_SPECIAL

    @property
    def reads_batch(self) -> bool:
        """Whether targets of the batch are negatives."""
        return self.config.source in ("in-batch", "mixed")

    def draw(self, targets_M: Tensor, draws: Draws, of_batch: "BatchTargets") -> Negatives:
        """Negatives for these positions; one may equal a target, and counts as none there."""
        source, num = self.config.source, self.config.num
        groups = _Groups.of(self.config.group_size, of_batch, len(targets_M))
        groups_G = groups.first + torch.arange(groups.num, device=targets_M.device)
        if source == "popularity":
            items_GN = self._popular(draws.of_groups(Purpose.NEGATIVES, groups_G, num))
            return groups.share(items_GN, num * self._share_I[items_GN])
        if source == "in-batch":
            items_GN = of_batch.targets[None]
            return groups.share(items_GN, len(of_batch.targets) * self._share_I[items_GN])
        items_GN = self._uniform(draws.of_groups(Purpose.NEGATIVES, groups_G, num))
        if source == "mixed":
            items_GN = torch.cat([items_GN, of_batch.targets[None]], dim=1)
        expected_GN = torch.full(items_GN.shape, num / self._num_items, device=items_GN.device)
        if source == "mixed":
            expected_GN += len(of_batch.targets) * self._share_I[items_GN]
        return groups.share(items_GN, expected_GN)

    def _uniform(self, words: Tensor) -> Tensor:
        return words.remainder_(self._num_items) + NUM_SPECIAL

    def _popular(self, words: Tensor) -> Tensor:
        # By inversion: torch.multinomial takes no more than 2^24 items.
        sums = as_uniform_double(words) * self._sums_I[-1]
        drawn = torch.searchsorted(self._sums_I, sums, right=True)
        return drawn.clamp(NUM_SPECIAL, len(self._sums_I) - 1)


@dataclass(frozen=True)
class BatchTargets:
    """Where the scored positions at hand lie among those of the global batch."""

    targets: Tensor
    """Of the whole batch; those at hand where no source reads more."""
    first: int = 0
    """Scored positions before those at hand."""


@dataclass(frozen=True)
class _Groups:
    """The groups that the positions at hand belong to, numbered in the global batch."""

    size: int
    first: int
    num: int
    num_before: int

    @classmethod
    def of(cls, size: int | None, of_batch: BatchTargets, num_positions: int) -> "_Groups":
        if size is None:
            return cls(max(1, num_positions), 0, 1, 0)
        first, num_before = divmod(of_batch.first, size)
        return cls(size, first, -(-(num_before + num_positions) // size), num_before)

    def share(self, items_GN: Tensor, expected_GN: Tensor) -> Negatives:
        return Negatives(items_GN, torch.log(expected_GN), self.size, self.num_before)
