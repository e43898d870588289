"""How far an epoch is, and when the ranks of a training look at that together."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from recsys.ranks import rank_and_world_size, sum_over_ranks

_LOOK_EVERY_S = 5.0
_MOST_STEPS = 1000


@dataclass(frozen=True)
class EpochReport:
    """What one epoch cost and brought; NaN for a metric that was not measured."""

    epoch: int
    loss: float
    ndcg10: float
    hr10: float
    windows_per_s: float
    tokens_per_s: float
    learning_rate: float
    ndcg10_error: float = math.nan
    """Standard error of `ndcg10` over the validation users."""

    @property
    def is_validated(self) -> bool:
        return not math.isnan(self.ndcg10)

    def metrics(self) -> dict[str, float]:
        return asdict(self)


@dataclass
class Progress:
    """What an epoch has brought so far, of this rank alone."""

    step: int = 0
    num_tokens: int = 0
    """Since this process took the epoch up."""
    loss_sum: float | Tensor = 0.0
    weight: float | Tensor = 0.0
    started: float = 0.0
    """When this process took the epoch up, on its own clock."""

    def sums(self) -> list[float]:
        """Loss, weight and tokens."""
        return [float(self.loss_sum), float(self.weight), float(self.num_tokens)]

    def describe(self, sums: list[float]) -> dict[str, float]:
        """Loss and speed by the sums of all ranks."""
        loss_sum, weight, num_tokens = sums
        elapsed_s = time.perf_counter() - self.started
        return {"loss": loss_sum / (weight or 1.0), "tokens_per_s": num_tokens / elapsed_s}

    def carry(self, sums: list[float]) -> None:
        """Goes on from these instead."""
        self.loss_sum, self.weight, num_tokens = sums
        self.num_tokens = int(num_tokens)


class Watch:
    """When ranks look at their progress together, and whether it is told then.

    They look after as many steps as take some five seconds, so that neither a GPU nor another rank
    is waited for at every step. The first rank's clock counts for all.

    Args:
        tell_every_s: seconds between what is told.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        tell_every_s: float,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tell_every_s, self._device, self._clock = tell_every_s, device, clock
        self._steps_apart = 1
        self.begin()

    def begin(self) -> None:
        """Counts from now on; every rank calls it at the same step."""
        self._num_steps = 0
        self._looked_at = self._told_at = self._clock()

    def is_due(self) -> bool:
        """Whether all ranks look after this step; each calls it after every step."""
        self._num_steps += 1
        return self._num_steps >= self._steps_apart

    def look(self) -> bool:
        """Whether it is time to tell. Every rank calls it when it is due."""
        now, (rank, _) = self._clock(), rank_and_world_size()
        is_time = now - self._told_at >= self._tell_every_s
        own = [now - self._looked_at, float(is_time)] if rank == 0 else [0.0, 0.0]
        elapsed_s, verdict = sum_over_ranks(own, self._device)
        most_s = min(_LOOK_EVERY_S, self._tell_every_s)
        num_steps = int(most_s * self._num_steps / max(elapsed_s, 1e-9))
        self._steps_apart = max(1, min(num_steps, _MOST_STEPS))
        self._num_steps, self._looked_at = 0, now
        if verdict:
            self._told_at = now
        return verdict > 0


def num_not_finite(values: Any) -> int:
    """How many of the floating tensors in nested lists and dicts hold a number that is not finite.

    A sum is not finite when a part of it is not, so that nothing of a tensor's size is made.
    """
    sums = [tensor.sum() for tensor in _floating(values)]
    if not sums:
        return 0
    device = sums[0].device
    return int((~torch.stack([part.to(device) for part in sums]).isfinite()).sum())


def _floating(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values.detach().float()] if values.is_floating_point() else []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in _floating(value)]
