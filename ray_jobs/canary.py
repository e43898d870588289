"""Ends canaries: promotes one that is better than the champion, rolls back one that is worse or
broken, and waits while neither is known. Made to be run every hour.

    python -m ray_jobs.canary --config synthetic --dry-run

It compares what visitors of the canary and of the champion did with their lists since its first
look, as `ray_jobs.experiment` does, by intervals that hold at all looks together
(`recsys.sequential`): click-through, conversion, and the share of lists that a lower rung gave. The
check of the sample ratio holds at all looks too. (Latency is not in the exposure log; the alert
AnswersLate looks at it.) Until the window after a list is over and the lake knows its events, only
faults are seen. After `canary.max_days` it decides as `canary.at_end` says.

Each decision is a line of DECISIONS.jsonl in the registry, which `ray_jobs.registry show` tells;
each look is kept in `<storage root>/canaries`. `--dry-run` looks, says what it would do and why,
and changes nothing. Safe to run again: a decision that a killed run noted and did not carry out is
looked at anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from data_lake.tables import open_table
from ray_jobs.config import PipelineConfig
from ray_jobs.experiment import gather, list_log, newest_event_us
from ray_jobs.job import Report, connected, main, timed
from ray_jobs.job_metrics import JobMetrics
from ray_jobs.online.canary_rules import Look, Verdict, decide, look_at
from ray_jobs.online.canary_state import Watch, open_watch, write_watch
from ray_jobs.online.visitors import Period
from recsys.attribution import NOTHING, Tally
from recsys.errors import ArtifactError
from recsys.registry import end_canary, promote, read_serving, record_decision

_CODES = {"roll back": -1, "wait": 0, "promote": 1}


@dataclass(frozen=True)
class Judged:
    """A canary with what was found and what follows."""

    watch: Watch
    look: Look
    verdict: Verdict
    at: datetime

    def facts(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "at": self.at.isoformat(timespec="seconds"),
            "version": self.watch.canary,
            "champion": self.watch.champion,
            "decision": self.verdict.decision,
            "reason": self.verdict.reason,
            "share": self.watch.share,
            **self.look.facts(),
        }


def run(config: PipelineConfig) -> Report:
    """Looks at each canary and does what follows. Raises: JobError, ArtifactError, TableError."""
    root = Path(config.storage.registry_uri)
    done: list[Judged] = []
    for canary in read_serving(root).shares:
        if canary not in read_serving(root).shares:
            continue  # the promotion of another one has ended it
        with timed(f"look at {canary}"):
            judged = judge(config, canary, datetime.now(UTC))
        _carry_out(root, judged)
        write_watch(config, judged.watch.with_look(judged.facts()))
        done.append(judged)
    _publish_metrics(config, done)
    return _report(done)


def preview(config: PipelineConfig) -> dict[str, Any]:
    """What a run would do and why; nothing of it is done or kept."""
    try:
        canaries = tuple(read_serving(Path(config.storage.registry_uri)).shares)
    except ArtifactError as error:
        return {"canaries": [], "refused": str(error)}
    if not canaries:
        return {"canaries": []}
    now = datetime.now(UTC)
    with connected():
        return {"canaries": [judge(config, canary, now).facts() for canary in canaries]}


def judge(config: PipelineConfig, canary: str, now: datetime) -> Judged:
    """What is known of a canary at a moment, and what follows from it; changes nothing.

    Raises: JobError when no list was logged, or the lake has no events.
    """
    limits = config.canary
    serving = read_serving(Path(config.storage.registry_uri))
    watch = open_watch(config, serving, canary, now)
    found, shown = measure(config, watch, now)
    look = look_at(found, shown, watch.share, watch.days_until(now), limits)
    return Judged(watch, look, decide(look, limits), now)


def measure(config: PipelineConfig, watch: Watch, now: datetime) -> tuple[Tally, Tally]:
    """Lists whose window is over with what followed, and all lists without."""
    storage, options = config.storage, config.storage.options
    log = list_log(storage.exposures_uri, options)
    events = open_table(storage.lake_uri, "events", options)
    window = timedelta(hours=config.canary.window_hours)
    period = _make_period(config, watch, round(now.timestamp() * 1e6), window)

    shown, _ = gather(log, None, period)
    # What the lake does not yet know of would count as no click.
    known_us = min(period.end_us, newest_event_us(events) - period.window_us)
    if known_us <= period.start_us:
        return NOTHING, shown
    found, _ = gather(log, events, replace(period, until_us=known_us))
    return found, shown


def _make_period(config: PipelineConfig, watch: Watch, now_us: int, window: timedelta) -> Period:
    """Of all lists, whether their window is over or not."""
    return Period(
        watch.champion,
        watch.canary,
        watch.start_us,
        now_us,
        now_us,
        window // timedelta(microseconds=1),
        0,
        config.experiment.clicks,
        config.experiment.purchases,
        config.storage.options,
    )


def _carry_out(root: Path, judged: Judged) -> None:
    watch, decision = judged.watch, judged.verdict.decision
    if decision == "wait":
        return
    record_decision(root, judged.facts())
    if decision == "promote":
        promote(root, watch.canary, champion=watch.champion)
    else:
        end_canary(root, watch.canary)


def _publish_metrics(config: PipelineConfig, done: list[Judged]) -> None:
    metrics = JobMetrics("canary", config)
    metrics.set("nextitem_canaries", len(done), "Canaries that the last run looked at.")
    for judged in done:
        version, look = judged.watch.canary, judged.look
        metrics.set(
            "nextitem_canary_decision",
            _CODES[judged.verdict.decision],
            "What the last look decided: 1 promotes, -1 rolls back, 0 waits.",
            version=version,
        )
        metrics.set(
            "nextitem_canary_age_seconds",
            86_400 * look.days,
            "Time since the comparison with the champion began.",
            version=version,
        )
        _set_gaps(metrics, version, look)
    metrics.publish()


def _set_gaps(metrics: JobMetrics, version: str, look: Look) -> None:
    for name, gap in look.gaps.items():
        if gap is None or gap.relative is None:
            continue
        for end in ("low", "high"):
            metrics.set(
                "nextitem_canary_gap_ratio",
                getattr(gap.relative, end),
                "End of the interval of a metric over the bar, relative to the champion.",
                version=version,
                metric=name,
                end=end,
            )


def _report(done: list[Judged]) -> Report:
    if not done:
        return Report("canary", "no canary serves")
    headline = "; ".join(f"{one.verdict.decision}: {one.watch.canary}" for one in done)
    figures: dict[str, Any] = {}
    for judged in done:
        figures |= _figures(judged, "" if len(done) == 1 else f"{judged.watch.canary} ")
    return Report("canary", headline, figures)


def _figures(judged: Judged, prefix: str) -> Mapping[str, Any]:
    watch, look = judged.watch, judged.look
    figures = {
        "canary": watch.canary,
        "champion": watch.champion,
        "decision": judged.verdict.decision,
        "reason": judged.verdict.reason,
        "days": look.days,
        "users_champion": look.ratio.num_control,
        "users_canary": look.ratio.num_treatment,
        "looks": len(watch.looks) + 1,
    }
    return {f"{prefix}{name}": value for name, value in figures.items()}


if __name__ == "__main__":
    main(run, job="canary", preview=preview)
