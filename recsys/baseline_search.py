"""Settings of the baselines, chosen as the epoch of a model is: by NDCG@10 on validation targets.

A baseline that keeps the settings of somebody else's data is easily beaten: on a log of short
intents co-visitation of neighbouring events ranks a fifth better than that of ten.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from recsys.baselines import BASELINES
from recsys.evaluation import rank_targets
from recsys.metrics import mean_accuracy
from recsys.splits import Split
from recsys.tokens import TokenStore

Settings = Mapping[str, float]

GRIDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "covisitation": {"window": (1, 2, 5, 10), "backward": (0.0, 0.3, 1.0)},
    "item-knn": {"neighbours": (20, 50, 200), "shrinkage": (0, 10, 100)},
    "als": {
        "factors": (32, 64, 128),
        "regularisation": (1.0, 10.0),
        "confidence": (1.0, 5.0, 25.0),
    },
    "ease": {"ridge": (30, 100, 300, 1000, 3000)},
}
"""The values of each setting of the baselines that have any; all combinations are tried."""
_SELECTION = "NDCG@10"

log = logging.getLogger(__name__)


class Trial(NamedTuple):
    """Settings, and the NDCG@10 that they reached in validation."""

    settings: Settings
    ndcg10: float


def try_settings(
    name: str,
    store: TokenStore,
    split: Split,
    num_rows: int,
    users_N: np.ndarray,
    *,
    max_training_users: int | None = None,
    filter_seen: bool = True,
    seed: int = 0,
) -> list[Trial]:
    """Every combination of `GRIDS[name]` on the validation targets of `users_N`; none for a
    baseline without a grid, or without users.

    With `max_training_users` a seeded sample of so many users is learned from, so that a search
    does not cost many times what the baseline itself does.
    """
    if not len(users_N):
        return []
    targets_N = split.validation_U[users_N]
    training = _sample_training(store, split, max_training_users, seed)
    trials = []
    for settings in _combinations(GRIDS.get(name, {})):
        baseline = BASELINES[name](**settings).fit(store, training, num_rows)
        ranking = rank_targets(baseline, store, users_N, targets_N, filter_seen=filter_seen)
        trials.append(Trial(settings, mean_accuracy(ranking.ranks_N)[_SELECTION]))
        log.info("%s with %s: %s %.4f in validation", name, settings, _SELECTION, trials[-1].ndcg10)
    return trials


def choose_settings(trials: list[Trial]) -> Settings:
    """Those of the first of the best; none where nothing was tried."""
    return max(trials, key=lambda trial: trial.ndcg10).settings if trials else {}


def _combinations(grid: Mapping[str, tuple[float, ...]]) -> Iterator[dict[str, float]]:
    if grid:
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def _sample_training(store: TokenStore, split: Split, max_users: int | None, seed: int) -> Split:
    """A split in which the users outside of a sample have no training event."""
    starts_U = store.offsets_U[:-1]
    training = np.flatnonzero(split.train_end_U > starts_U)
    if max_users is None or len(training) <= max_users:
        return split
    chosen = np.random.default_rng(seed).choice(training, max_users, replace=False)
    ends_U = starts_U.copy()
    ends_U[chosen] = split.train_end_U[chosen]
    return replace(split, train_end_U=ends_U)
