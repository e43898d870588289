"""The baselines of the leader board. Their settings are chosen as the epochs of models are: by
NDCG@10 on the validation targets, before a test target is ranked.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.leaderboard_files import baselines_folder, keep
from benchmarks.leaderboard_measures import MAX_USERS, choose_users, facts_of, measure_scorer
from benchmarks.measure import machine
from benchmarks.published import Dataset, read_dataset
from ray_jobs.code_version import code_version
from recsys.baselines import BASELINES, EASE, Baseline
from recsys.context import NO_TIME
from recsys.evaluation import rank_targets
from recsys.metrics import mean_accuracy
from recsys.splits import CutTarget

GRIDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "covisitation": {"window": (2, 5, 10), "backward": (0.0, 0.3, 1.0)},
    "item-knn": {"neighbours": (20, 50, 200), "shrinkage": (0, 10, 100)},
    "als": {
        "factors": (32, 64, 128),
        "regularisation": (1.0, 10.0),
        "confidence": (1.0, 5.0, 25.0),
    },
    "ease": {"ridge": (30, 100, 300, 1000, 3000)},
}
"""The values of each setting; all combinations are tried."""
_RECENT = {"globo": ("1 h", 1 / 24)}
"""What recent popularity counts, in words and in days; seven days where nothing is said."""
_SELECTION = "NDCG@10"

log = logging.getLogger("leaderboard")


def measure_baselines(
    name: str,
    cut: tuple[float, float] | None = None,
    cut_target: CutTarget = "first",
    *,
    max_users: int = MAX_USERS,
    is_tuned: bool = True,
) -> dict[str, Any]:
    """Every baseline on the test targets of a data set; recent popularity where there are times.

    With `is_tuned=False` they keep the settings of their classes, where trying all would take days.
    """
    code = code_version()
    dataset = read_dataset(name, cut=cut, cut_target=cut_target)
    users = choose_users(dataset.split.test_U, max_users)
    rows, tried = [], {}
    for baseline in _choose_baselines(dataset):
        grid = GRIDS.get(baseline, {}) if is_tuned else {}
        fitted, tried[baseline] = _tune(baseline, grid, dataset, max_users)
        row = measure_scorer(fitted, dataset, users)
        rows.append(replace(row, name=_shown(baseline, dataset)))
    folder = baselines_folder(dataset.name, dataset.protocol)
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        np.save(folder / f"{row.name}.npy", row.ranking.ranks_N)
    found = {
        "baselines": name,
        "cut": cut,
        "cut_target": cut_target,
        "is_tuned": is_tuned,
        "machine": machine(),
        "code_version": code,
        "settings": {baseline: _best(runs)["settings"] for baseline, runs in tried.items() if runs},
        "tried": {baseline: runs for baseline, runs in tried.items() if runs},
        **facts_of(dataset, users, rows),
    }
    suffix = "" if cut is None else {"first": "-cut", "last": "-cut-last"}[cut_target]
    keep(f"baselines-{name}{suffix}", found)
    return found


def _choose_baselines(dataset: Dataset) -> Iterator[str]:
    is_small = dataset.catalogue.num_items <= EASE.max_items
    is_timed = bool((dataset.store.timestamps_T != NO_TIME).any())
    fits = {"ease": is_small, "recent-popularity": is_timed}
    return (name for name in BASELINES if fits.get(name, True))


def _shown(name: str, dataset: Dataset) -> str:
    return f"{name}, {_recent(dataset)[0]}" if name == "recent-popularity" else name


def _recent(dataset: Dataset) -> tuple[str, float]:
    return _RECENT.get(dataset.name, ("7 d", 7))


def _tune(
    name: str, grid: Mapping[str, tuple[float, ...]], dataset: Dataset, max_users: int
) -> tuple[Baseline, list[dict[str, Any]]]:
    """The best of the grid, fitted, and what each of its points reached in validation; without a
    grid the settings of the class, and nothing is validated.
    """
    settings = {"days": _recent(dataset)[1]} if name == "recent-popularity" else {}
    if not grid:
        return _fit(name, settings, dataset), []
    users = choose_users(dataset.split.validation_U, max_users)
    targets = dataset.split.validation_U[users]
    tried: list[dict[str, Any]] = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        fitted = _fit(name, settings, dataset)
        ranks_N = rank_targets(fitted, dataset.store, users, targets).ranks_N
        tried.append({"settings": settings, _SELECTION: mean_accuracy(ranks_N)[_SELECTION]})
        log.info("%s: %s", name, tried[-1])
        if tried[-1] is _best(tried):
            best = fitted
    return best, tried


def _fit(name: str, settings: Mapping[str, float], dataset: Dataset) -> Baseline:
    return BASELINES[name](**settings).fit(dataset.store, dataset.split, dataset.catalogue.num_rows)


def _best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the best."""
    return max(tried, key=lambda run: float(run[_SELECTION]))
