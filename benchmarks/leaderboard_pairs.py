"""Rows of the leader board against others, paired by user: another row, the baselines, and the same
weights told nothing of the request.
"""

from typing import Any

import numpy as np

from benchmarks.leaderboard_cells import METRICS
from benchmarks.leaderboard_files import (
    TIME_BLIND,
    home,
    keep,
    read_baseline_ranks,
    read_model_ranks,
    read_result,
    read_results,
    section_of,
)
from recsys.comparison import compare, compare_seeds
from recsys.leaderboard import comparison_facts


def compare_trainings(name: str, other: str, seed: int) -> dict[str, Any]:
    """Two rows with the same seed, paired by user. Raises: FileNotFoundError before both are
    trained, ValueError when they have other targets.
    """
    results = [read_result(f"{row}-{seed}") for row in (name, other)]
    if results[0]["targets_sha256"] != results[1]["targets_sha256"]:
        raise ValueError(
            f"{name} and {other} rank other test targets; compare rows of one data set."
        )
    ranks = [np.load(home() / f"{row}-{seed}" / "ranks.npy") for row in (name, other)]
    found = {
        "row": name,
        "against": other,
        "seeds": seed,
        **{key: results[0][key] for key in ("dataset", "protocol", "targets_sha256")},
        **{metric: comparison_facts(compare(*ranks, metric=metric)) for metric in METRICS},
    }
    keep(f"compare-{name}-{other}-{seed}", found)
    return found


def measure_lifts() -> list[str]:
    """Every trained row whose ranks and those of its baselines are still on this machine, paired
    with each baseline by user, as `results/leaderboard/lift-<row>.json`; their names.
    """
    of_baselines = {section_of(one): one for one in read_results() if "baselines" in one}
    return [
        row
        for row, seeds in _read_trainings().items()
        if section_of(seeds[0]) in of_baselines
        and _measure_lift(seeds, of_baselines[section_of(seeds[0])])
    ]


def measure_requests() -> list[str]:
    """Every trained row whose ranks with and without the request are still on this machine, paired
    by user, as `results/leaderboard/told-<row>.json`; their names.
    """
    return [row for row, seeds in _read_trainings().items() if _measure_request(seeds)]


def _read_trainings() -> dict[str, list[dict[str, Any]]]:
    """What the seeds of each row found."""
    by_row: dict[str, list[dict[str, Any]]] = {}
    for one in read_results():
        if "seed" in one:
            by_row.setdefault(one["row"], []).append(one)
    return by_row


def _measure_lift(seeds: list[dict[str, Any]], baselines: dict[str, Any]) -> bool:
    """Whether there was anything to compare. The seeds that are compared are those with ranks."""
    ours = {one["seed"]: ranks_N for one in seeds if (ranks_N := read_model_ranks(one)) is not None}
    theirs = {
        name: ranks_N
        for name in baselines["test"]
        if (ranks_N := read_baseline_ranks(baselines, name)) is not None
    }
    if not ours or not theirs:
        return False
    row, ours_SN = seeds[0]["row"], np.stack(list(ours.values()))
    found = {
        "lift_of": row,
        "seeds": list(ours),
        **{key: baselines[key] for key in ("dataset", "protocol", "targets_sha256")},
        "over": {
            name: {
                metric: comparison_facts(compare_seeds(ours_SN, ranks_N[None], metric=metric))
                for metric in METRICS
            }
            for name, ranks_N in theirs.items()
        },
    }
    keep(f"lift-{row}", found)
    return True


def _measure_request(seeds: list[dict[str, Any]]) -> bool:
    """Whether there was anything to compare; of the seeds those that have both."""
    both = {
        one["seed"]: (told_N, blind_N)
        for one in seeds
        if (told_N := read_model_ranks(one)) is not None
        and (blind_N := read_model_ranks(one, TIME_BLIND)) is not None
    }
    if not both:
        return False
    told_SN, blind_SN = (np.stack(ranks) for ranks in zip(*both.values(), strict=True))
    row = seeds[0]["row"]
    found = {
        "told_of_request": row,
        "seeds": list(both),
        **{key: seeds[0][key] for key in ("dataset", "protocol", "targets_sha256")},
        **{
            metric: comparison_facts(compare_seeds(told_SN, blind_SN, metric=metric))
            for metric in METRICS
        },
    }
    keep(f"told-{row}", found)
    return True
