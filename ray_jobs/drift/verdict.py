"""What counts of drift say: a verdict on each measure, and why some have none."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ray_jobs.drift.axes import as_text
from ray_jobs.drift.gather import Gathered
from ray_jobs.drift.plan import LIVE_MEASURES
from ray_jobs.sections.upkeep import MonitorConfig
from recsys.drift import Measure, covered_shares, jensen_shannon, share_with
from recsys.drift_null import LEAST_GROUPS, can_be_judged, judge_drift, least_resamples

_RESAMPLES_BEYOND = 5
"""Of each measure's own, at least: a threshold between fewer is a rough one."""

Facts = dict[str, Any]


def find_gaps(gathered: Gathered) -> dict[str, str]:
    """Measures that cannot be judged, each with the reason."""
    reasons = {name: _find_gap(name, gathered) for name in gathered.plan.measures}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def judge(
    monitor: MonitorConfig, gathered: Gathered, gaps: Mapping[str, str], *, seed: int = 0
) -> dict[str, Facts]:
    """Drift, threshold and alarm of each measure without a gap, with both sides' shares."""
    measures = [one for name, one in gathered.plan.measures.items() if name not in gaps]
    needed = least_resamples(len(measures), monitor.false_alarm_rate)
    judged = judge_drift(
        measures,
        {one.name: split_windows(gathered, one.name) for one in measures},
        {one.name: gathered.counts[one.name][:, -1] for one in measures},
        false_alarm_rate=monitor.false_alarm_rate,
        num_resamples=max(monitor.num_resamples, _RESAMPLES_BEYOND * needed),
        seed=seed,
    )
    return {
        one.name: {
            "kind": one.kind,
            "alarm": judged[one.name].is_alarm,
            **asdict(judged[one.name]),
            **_describe_sides(one, gathered.counts[one.name]),
        }
        for one in measures
    }


def split_windows(gathered: Gathered, name: str) -> np.ndarray:
    """Counts of the reference period as `drift_null` takes them, `[G, W, P, K]`."""
    counts, periods = gathered.counts[name], gathered.plan.periods
    return counts[:, :-1].reshape(len(counts), periods.num_windows, periods.days, -1)


def current_share(gathered: Gathered, name: str) -> float | None:
    """Share of the second of two counts in the current period; None where nothing was counted."""
    counts = gathered.counts.get(name)
    if counts is None or not counts[:, -1].any():
        return None
    return float(share_with(counts[:, -1].sum(axis=0)))


def _find_gap(name: str, gathered: Gathered) -> str | None:
    periods = gathered.plan.periods
    if name not in gathered.counts or not gathered.counts[name].any():
        if name == "scores":
            return "no list of the version that serves has a score in the reference period"
        return "no list was logged" if name in LIVE_MEASURES else "nothing was counted"
    needed_us = periods.reference_from_us - periods.window_us
    if name == "unknown_items" and gathered.first_event_us > needed_us:
        return (
            f"the lake's events begin on {as_text(gathered.first_event_us)}, and what was new in "
            f"the reference period is known with events since {as_text(needed_us)}"
        )
    windows = split_windows(gathered, name)
    if not windows.any(axis=(0, 2, 3)).all():
        return (
            f"of the {periods.num_windows} windows of {periods.days} days that end with "
            f"{as_text(periods.reference_until_us)} some have no counts; wait for more history, "
            "lower monitor.days, or choose another monitor.reference_until"
        )
    if not can_be_judged(windows):
        return f"the reference period has counts in fewer than {LEAST_GROUPS} groups of users"
    if not gathered.counts[name][:, -1].any():
        return "nothing was counted in the current period"
    return None


def _describe_sides(measure: Measure, counts: np.ndarray) -> Facts:
    reference_K, current_K = counts[:, :-1].sum(axis=(0, 1)), counts[:, -1].sum(axis=0)
    sides = {"reference": reference_K, "current": current_K}
    if measure.kind == "coverage":
        shares = covered_shares(reference_K, current_K)
        covered = {side: float(share) for side, share in zip(sides, shares, strict=True)}
        return covered | {f"num_{side}": int(side_K[0]) for side, side_K in sides.items()}
    totals = {f"num_{side}": int(side_K.sum()) for side, side_K in sides.items()}
    if measure.kind != "shares":
        return totals | {side: float(share_with(side_K)) for side, side_K in sides.items()}
    return {
        **totals,
        "jensen_shannon": float(jensen_shannon(reference_K, current_K)),
        "labels": list(measure.labels),
        **{side: (side_K / max(1, side_K.sum())).tolist() for side, side_K in sides.items()},
    }
