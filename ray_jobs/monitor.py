"""Finds out whether the world has moved away from what the version that serves was trained on.

    python -m ray_jobs.monitor --config synthetic

The last week is compared with a reference period that the version was trained on: which items and
categories are popular, in which context, with how long histories, how many items are unknown; and,
where the endpoint logs its lists, how often the next event is on a list, how often a list is
clicked, how much of the catalogue lists show, and the scores. Writes `report.html`, `report.md`
and `report.json` into `<storage root>/monitor/<time>`, and figures for Prometheus. Where nothing
moves, a share of `monitor.false_alarm_rate` of the runs raises an alarm; alarms do not fail the
job. The reference period stays the same for as long as a version serves
(`<storage root>/monitor/reference.json`).
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from data_lake.freshness import newest_event
from data_lake.tables import open_table
from ray_jobs.config import PipelineConfig
from ray_jobs.drift.axes import DAY_US, Periods, as_text, as_us
from ray_jobs.drift.gather import Gathered, gather
from ray_jobs.drift.reference import (
    Reference,
    describe_settings,
    read_reference,
    write_reference,
)
from ray_jobs.drift.report import write_drift_report
from ray_jobs.drift.verdict import Facts, current_share, find_gaps, judge
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main, timed
from ray_jobs.job_metrics import JobMetrics
from ray_jobs.sections.storage import expand
from ray_jobs.sections.upkeep import MonitorConfig
from recsys.artifact import Artifact, load_artifact
from recsys.registry import serving_version

_LIVE = {
    "live_hit_rate": "Share of lists that had the visitor's next event among their first ten.",
    "live_click_through": "Share of lists that had an item of the visitor's events soon after.",
    "unknown_items": "Share of events on items that the version that serves does not know.",
}


def run(config: PipelineConfig) -> Report:
    """Compares both periods and reports. Raises: JobError, ArtifactError, LakeError."""
    folder = _monitor_folder(config)
    registry = Path(config.storage.registry_uri)
    artifact = load_artifact(registry / serving_version(registry))
    events = open_table(config.storage.lake_uri, "events", config.storage.options)
    newest_us = _newest_event_us(events)

    settings = describe_settings(config.monitor, artifact.version)
    kept = read_reference(folder, settings)
    trained_until_us = artifact.manifest.get("trained_until_us")
    periods = choose_periods(config.monitor, newest_us, trained_until_us, kept)
    if kept is None or kept.until_us != periods.reference_until_us:
        kept = Reference(settings, periods.reference_until_us, score_edges=())
    gathered = gather(
        config,
        artifact,
        events,
        periods,
        events_until_us=newest_us,
        score_edges=kept.score_edges,
    )
    _refuse_empty_current(gathered)
    write_reference(folder, replace(kept, score_edges=gathered.plan.score_edges))
    gaps = find_gaps(gathered)
    with timed("resample"):
        measures = judge(config.monitor, gathered, gaps, seed=config.seed)

    facts = {
        "data": config.name,
        "version": artifact.version,
        "written_at": _now_text(),
        "periods": periods.describe(),
        "false_alarm_rate": config.monitor.false_alarm_rate,
        "measures": measures,
        "gaps": gaps,
        "current": {name: current_share(gathered, name) for name in _LIVE},
        "serving_version_age_s": _age_of_version(artifact),
        "newest_event_age_s": time.time() - newest_us / 1_000_000,
        "made_from": {
            "settings": config.monitor.model_dump(mode="json"),
            "seed": config.seed,
            "events_version": events.version(),
        },
    }
    written = _write(folder, facts)
    _publish(config, facts)
    return _report(facts, written)


def choose_periods(
    monitor: MonitorConfig, newest_us: int, trained_until_us: int | None, kept: Reference | None
) -> Periods:
    """Both periods, as `MonitorConfig` says.

    Args:
        newest_us: time of the newest event.
        trained_until_us: of the newest event that the version was trained on, if known.
        kept: the reference of earlier runs for this version, whose period stays.

    Raises: JobError where the periods would overlap.
    """
    asked = monitor.current_until
    current_until_us = newest_us + 1 if asked is None else as_us(asked)
    current_from_us = current_until_us - monitor.days * DAY_US
    if monitor.reference_until is not None:
        reference_until_us = as_us(monitor.reference_until)
    elif kept is not None and kept.until_us <= current_from_us:
        reference_until_us = kept.until_us
    else:
        trained_us = current_from_us if trained_until_us is None else trained_until_us + 1
        reference_until_us = min(trained_us, current_from_us)
    if reference_until_us > current_from_us:
        raise JobError(
            f"The current period begins on {as_text(current_from_us)}, before the reference period "
            f"ends on {as_text(reference_until_us)}; ingest newer events, lower monitor.days, or "
            "set an earlier monitor.reference_until."
        )
    return Periods(reference_until_us, current_until_us, monitor.reference_windows, monitor.days)


def _monitor_folder(config: PipelineConfig) -> Path:
    root = expand(config.storage.root)
    if "://" in root:
        raise JobError(
            f"Reports are written to a folder, not to {root}; set storage.root to one, and "
            "storage.lake to where the tables lie."
        )
    return Path(root) / "monitor"


def _newest_event_us(events: DeltaTable) -> int:
    newest = newest_event(events)
    if newest is None:
        raise JobError("The events table is empty; run ray_jobs.ingest first.")
    return as_us(newest)


def _refuse_empty_current(gathered: Gathered) -> None:
    if not gathered.counts["popularity"][:, -1].any():
        times = gathered.plan.periods.describe()
        raise JobError(
            f"There is no event in the current period, {times['current_from']} to "
            f"{times['current_until']}; ingest newer events, or set monitor.current_until."
        )


def _write(folder: Path, facts: Facts) -> Path:
    written = folder / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    written.mkdir(parents=True, exist_ok=True)
    (written / "report.json").write_text(json.dumps(facts, indent=1))
    write_drift_report(written, facts)
    return written


def _publish(config: PipelineConfig, facts: Facts) -> None:
    metrics = JobMetrics("monitor", config)
    for name, found in facts["measures"].items():
        for figure, meaning in (
            ("drift", "How far the current period is from the reference period."),
            ("threshold", "What drift exceeds at an alarm."),
            ("alarm", "1 where drift exceeds its threshold, else 0."),
        ):
            gauge = "nextitem_drift_value" if figure == "drift" else f"nextitem_drift_{figure}"
            metrics.set(gauge, float(found[figure]), meaning, measure=name)
    for name, meaning in _LIVE.items():
        if facts["current"][name] is not None:
            metrics.set(f"nextitem_{name}_ratio", facts["current"][name], meaning)
    metrics.set(
        "nextitem_newest_event_age_seconds",
        facts["newest_event_age_s"],
        "Time since the newest event of the lake.",
    )
    if facts["serving_version_age_s"] is not None:
        metrics.set(
            "nextitem_serving_version_age_seconds",
            facts["serving_version_age_s"],
            "Time since the version that serves was published.",
        )
    metrics.publish()


def _report(facts: Facts, written: Path) -> Report:
    measures = facts["measures"]
    alarms = [name for name, found in measures.items() if found["alarm"]]
    calm = "nothing moved beyond chance" if measures else "nothing could be judged"
    figures: dict[str, Any] = {
        "version": facts["version"],
        **facts["periods"],
        "measures": len(measures),
        "alarms": len(alarms),
        **{name: value for name, value in facts["current"].items() if value is not None},
        "gaps": _join_gaps(facts["gaps"]) or "none",
        "report": str(written / "report.html"),
    }
    return Report("monitor", f"drift in {', '.join(alarms)}" if alarms else calm, figures)


def _join_gaps(gaps: Mapping[str, str]) -> str:
    """Each reason once, behind all measures that it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in gaps.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(some)}: {reason}" for reason, some in names.items())


def _age_of_version(artifact: Artifact) -> float | None:
    published = artifact.manifest.get("published_at")
    if published is None:
        return None
    return time.time() - datetime.fromisoformat(published).timestamp()


def _now_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    main(run, job="monitor")
