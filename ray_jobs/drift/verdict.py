"""What counts of drift say: thresholds, which are kept for as long as a version serves, and a
verdict on each measure.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_jobs.config import MonitorConfig, PipelineConfig
from ray_jobs.drift.axes import as_text
from ray_jobs.drift.gather import Gathered
from ray_jobs.drift.plan import LIVE_MEASURES
from ray_jobs.errors import JobError
from recsys.drift import Measure, covered_shares, jensen_shannon, measure_drift, share_with
from recsys.drift_null import LEAST_GROUPS, Threshold, can_be_judged, find_thresholds

THRESHOLDS = "thresholds.json"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """The content of thresholds.json."""

    computed_from: Facts
    """The settings, the version that served, the reference period and the events that it had."""
    score_edges: tuple[float, ...]
    thresholds: dict[str, Threshold]

    @property
    def reference_until_us(self) -> int:
        until_us: int = self.computed_from["reference_until_us"]
        return until_us


def describe_settings(config: PipelineConfig, version: str) -> Facts:
    """What thresholds depend on, beside the events."""
    settings = config.monitor.model_dump(mode="json", exclude={"current_until"})
    return {"version": version, "seed": config.seed, **settings}


def read_kept(folder: Path, settings: Facts) -> Kept | None:
    """The thresholds that were computed with the same settings; None where there are none.

    Raises: JobError when the file is damaged.
    """
    path = folder / THRESHOLDS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        computed_from = content["computed_from"]
        if computed_from["settings"] != settings:
            return None
        thresholds = {name: Threshold(**one) for name, one in content["thresholds"].items()}
        return Kept(computed_from, tuple(content["score_edges"]), thresholds)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(
            f"{path} is damaged ({error!r}); delete it, and thresholds are computed again."
        ) from None


def write_kept(folder: Path, kept: Kept) -> None:
    """Replaces the file at once; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "computed_from": kept.computed_from,
        "score_edges": list(kept.score_edges),
        "thresholds": {name: asdict(one) for name, one in kept.thresholds.items()},
    }
    temporary = folder / f".{THRESHOLDS}-{os.getpid()}"
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, folder / THRESHOLDS)


def find_gaps(gathered: Gathered) -> dict[str, str]:
    """Measures for which the reference period tells no threshold, each with the reason."""
    reasons = {name: _find_gap(name, gathered) for name in gathered.plan.measures}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def find_current_gaps(gathered: Gathered, kept: Kept) -> dict[str, str]:
    """Measures that have a threshold, and nothing in the current period to compare with it."""
    names = [name for name in kept.thresholds if not gathered.counts[name][:, -1].any()]
    return dict.fromkeys(names, "nothing was counted in the current period")


def learn_thresholds(
    monitor: MonitorConfig, gathered: Gathered, origin: Facts, *, seed: int = 0
) -> Kept:
    """Thresholds of all measures that the reference period tells any for.

    Args:
        origin: what they are computed from, beside the periods; with `settings`, of
            `describe_settings`, they are found again.
    """
    gaps, periods = find_gaps(gathered), gathered.plan.periods
    measures = [one for name, one in gathered.plan.measures.items() if name not in gaps]
    thresholds = find_thresholds(
        measures,
        {one.name: split_windows(gathered, one.name) for one in measures},
        false_alarm_rate=monitor.false_alarm_rate,
        num_resamples=monitor.num_resamples,
        seed=seed,
    )
    computed_from = {
        **origin,
        "periods": periods.describe(),
        "reference_until_us": periods.reference_until_us,
    }
    return Kept(computed_from, gathered.plan.score_edges, thresholds)


def split_windows(gathered: Gathered, name: str) -> np.ndarray:
    """Counts of the reference period as `drift_null` takes them, `[G, W, P, K]`."""
    counts, periods = gathered.counts[name], gathered.plan.periods
    return counts[:, :-1].reshape(len(counts), periods.num_windows, periods.days, -1)


def judge(gathered: Gathered, kept: Kept) -> dict[str, Facts]:
    """Drift, threshold and alarm of each measure that has both, with both sides' shares."""
    return {
        name: _judge(gathered.plan.measures[name], gathered.counts[name], threshold)
        for name, threshold in kept.thresholds.items()
        if gathered.counts[name][:, -1].any()
    }


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
    if not can_be_judged(split_windows(gathered, name)):
        return (
            f"the reference period has counts in fewer than {LEAST_GROUPS} groups of users, or a "
            "window without any; choose another monitor.reference_until"
        )
    return None


def _judge(measure: Measure, counts: np.ndarray, threshold: Threshold) -> Facts:
    reference_K, current_K = counts[:, :-1].sum(axis=(0, 1)), counts[:, -1].sum(axis=0)
    drift = float(measure_drift(measure, reference_K, current_K))
    found = {
        "kind": measure.kind,
        "drift": drift,
        "threshold": threshold.value,
        "alarm": drift > threshold.value,
        "usual": threshold.usual,
        "quantile": threshold.quantile,
        "dispersion": threshold.dispersion,
    }
    return found | _describe_sides(measure, reference_K, current_K)


def _describe_sides(measure: Measure, reference_K: np.ndarray, current_K: np.ndarray) -> Facts:
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
