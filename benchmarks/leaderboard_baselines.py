"""The baselines of the leader board. Their settings are chosen as the epochs of models are: by
NDCG@10 on the validation targets, before a test target is ranked.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.leaderboard_files import baselines_folder, keep
from benchmarks.leaderboard_measures import MAX_USERS, facts_of, measure_scorer
from benchmarks.measure import machine
from benchmarks.published import Dataset, read_dataset
from ray_jobs.code_version import code_version
from recsys.baseline_search import Trial, choose_settings, try_settings
from recsys.baselines import BASELINES, EASE, make_baselines
from recsys.context import NO_TIME
from recsys.splits import CutTarget
from recsys.validation import sample_users

_RECENT = {"globo": ("1 h", 1 / 24)}
"""What recent popularity counts, in words and in days; seven days where nothing is said."""

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
    users = sample_users(dataset.split.test_U, max_users, seed=0)
    names = tuple(_choose_baselines(dataset))
    trials = {name: _try(name, dataset, max_users) if is_tuned else [] for name in names}
    settings = {name: choose_settings(found) for name, found in trials.items() if found}
    data = dataset.store, dataset.split, dataset.catalogue.num_rows
    days = _recent(dataset)[1]
    rows = [
        measure_scorer(baseline.fit(*data), dataset, users)
        for baseline in make_baselines(names, recent_days=days, settings=settings)
    ]
    rows = [replace(row, name=_shown(row.name, dataset)) for row in rows]
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
        "settings": settings,
        "tried": {
            name: [trial._asdict() for trial in found] for name, found in trials.items() if found
        },
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


def _try(name: str, dataset: Dataset, max_users: int) -> list[Trial]:
    users = sample_users(dataset.split.validation_U, max_users, seed=0)
    return try_settings(name, dataset.store, dataset.split, dataset.catalogue.num_rows, users)
