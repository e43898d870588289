"""What a model is worth during training: the validation targets of a sample of users, ranked by all
workers together.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from recsys.errors import ScoreError, TrainingError
from recsys.evaluation import rank_targets
from recsys.model import NextItemModel
from recsys.ranks import rank_and_world_size, sum_over_ranks
from recsys.scorer import ModelScorer
from recsys.splits import Split
from recsys.tokens import TokenStore


class Validated(NamedTuple):
    """Means over the users of all ranks; 0 where there is none."""

    hr10: float
    ndcg10: float
    ndcg10_error: float
    """Standard error of `ndcg10`."""


@dataclass(frozen=True)
class Validation:
    """The users that are ranked each time, and how.

    Args:
        known_at_request_F: which context fields a scored position may carry, bool.
        filter_seen: whether items of the history are left out of the ranking.
    """

    store: TokenStore
    split: Split
    users: np.ndarray
    known_at_request_F: np.ndarray
    filter_seen: bool

    def rank(self, model: NextItemModel, dtype: torch.dtype) -> Validated:
        """The metrics of a model that counts in `dtype`; each rank ranks its part of the users.

        Raises: TrainingError, on every rank, when a score is not a number.
        """
        rank, world_size = rank_and_world_size()
        users = self.users[rank::world_size]
        sums = [0.0, 0.0, 0.0, float(len(users)), 0.0]
        try:
            sums[:3] = self._sum_up(model, dtype, users)
        except ScoreError:
            sums[4] = 1.0
        hits, gains, squares, count, num_broken = sum_over_ranks(sums, model.item_bias.device)
        if num_broken:
            raise TrainingError(
                "The model gives scores that are not numbers; lower optimiser.learning_rate or "
                "train in fp32."
            )
        count = max(count, 1)
        error = math.sqrt(max(0.0, squares / count - (gains / count) ** 2) / count)
        return Validated(hits / count, gains / count, error)

    def _sum_up(self, model: NextItemModel, dtype: torch.dtype, users: np.ndarray) -> list[float]:
        """Hits, gains and squares of gains of these users."""
        if not len(users):
            return [0.0, 0.0, 0.0]
        scorer = ModelScorer(model, self.known_at_request_F, dtype=dtype)
        targets_N = self.split.validation_U[users]
        ranks_N = rank_targets(
            scorer, self.store, users, targets_N, filter_seen=self.filter_seen
        ).ranks_N
        is_hit_N = ranks_N <= 10
        gains_N = is_hit_N / np.log2(1 + ranks_N)
        return [float(is_hit_N.sum()), float(gains_N.sum()), float((gains_N**2).sum())]


def sample_users(targets_U: np.ndarray, num_users: int, seed: int) -> np.ndarray:
    """Users that have a target, `num_users` of them at most, ascending; the same for each seed."""
    users = np.flatnonzero(targets_U >= 0)
    if len(users) <= num_users:
        return users
    return np.sort(np.random.default_rng(seed).choice(users, num_users, replace=False))
