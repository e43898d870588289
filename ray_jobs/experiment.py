"""What one served version does better than another: click-through and conversion of the lists that
visitors were shown, joined with what they did afterwards.

    python -m ray_jobs.experiment --config synthetic --set experiment.window_hours=24

Without versions it takes the champion and the canary of the registry. Writes report.html and
report.json into `<storage root>/experiments/<name>/`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from deltalake import DeltaTable
from pyarrow.fs import FileInfo

from data_lake.schemas import TIMESTAMP
from data_lake.storage import list_folder, locate
from data_lake.tables import files_by_bucket, num_buckets_of, open_table
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.exchange import finish_in_order, get
from ray_jobs.job import Report, main, timed
from ray_jobs.job_metrics import JobMetrics
from ray_jobs.online.experiment_report import describe, write_experiment
from ray_jobs.online.visitors import Period, first_shown, load_events, load_lists, tally_group
from ray_jobs.sections.serving import ExperimentConfig
from ray_jobs.sections.storage import expand
from recsys.attribution import NOTHING, Tally
from recsys.experiment import METRICS, adjust, check_sample_ratio, compare_arms
from recsys.metrics import Interval
from recsys.registry import Serving, list_states

_DAY_US = 86_400_000_000
_MAX_GROUPS = 256
"""Of visitors; each is joined by one task."""
_MAX_FILES, _MAX_BYTES = 1_000, 64 * 2**20
"""Of the exposure log that one task reads."""
_CLOCKS_DIFFER = timedelta(hours=1)
"""At most: of the endpoint and of the store that it logs to."""


@dataclass(frozen=True)
class Arms:
    """Two versions, and the share that one of them was given."""

    control: str
    treatment: str
    treatment_share: float
    """Among the visitors of both."""


def run(config: PipelineConfig) -> Report:
    """Joins, compares and writes the report. Raises: JobError, ArtifactError, TableError."""
    arms = find_arms(config)
    folder = _folder(config, arms)
    storage = config.storage
    events = open_table(storage.lake_uri, "events", storage.options)
    log = list_log(storage.exposures_uri, storage.options)
    period = _find_period(config, arms, log, newest_event_us(events))

    with timed("join lists and events"):
        found, counts = gather(log, events, period)
    facts = judge(config.experiment, arms, period, found, counts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(facts, indent=1))
    write_experiment(folder, facts)
    _publish_metrics(config, facts)
    return _report(facts, folder)


def find_arms(config: PipelineConfig) -> Arms:
    """The versions that are compared, and the share that the registry gave the treatment.

    Raises: JobError when it never gave any, or there was more than one canary.
    """
    wanted = config.experiment
    states = list_states(Path(config.storage.registry_uri))
    control, treatment = _find_versions(wanted, states)
    if wanted.treatment_share is not None:
        return Arms(control, treatment, wanted.treatment_share)
    for state in reversed(states):
        theirs, ours = state.share_of(control), state.share_of(treatment)
        if theirs > 0 and ours > 0:
            return Arms(control, treatment, ours / (theirs + ours))
    raise JobError(
        f"The registry knows of no time at which {control} and {treatment} served side by side; "
        "set experiment.treatment_share, or compare other versions."
    )


def list_log(uri: str, options: dict[str, str]) -> dict[str, FileInfo]:
    """The files of the exposure log by their URIs. Raises: JobError when there is none."""
    _, root = locate(uri, options)
    files = {
        f"{uri}{info.path.removeprefix(root)}": info
        for info in list_folder(uri, options)
        if info.base_name.endswith(".parquet") and not info.base_name.startswith(".")
    }
    if not files:
        raise JobError(
            f"No list was logged in {uri}; serve with the setting `exposures` pointing there."
        )
    return dict(sorted(files.items()))


def newest_event_us(events: DeltaTable) -> int:
    """Until when the lake knows what happened, microseconds in UTC.

    Raises: JobError when it has no event.
    """
    actions = pa.table(events.get_add_actions(flatten=True))
    name = "max.timestamp"
    times = (
        actions[name].cast(TIMESTAMP) if name in actions.column_names else pa.nulls(0, TIMESTAMP)
    )
    newest_us: int | None = pc.max(times.cast(pa.int64())).as_py()
    if newest_us is None:
        raise JobError("The lake has no events; run ray_jobs.ingest first.")
    return newest_us


def gather(
    log: Mapping[str, FileInfo], events: DeltaTable | None, period: Period
) -> tuple[Tally, Counter[str]]:
    """What both arms did, and how many lists were left out; two rounds of tasks, so that no process
    holds more than a part of the log, a bucket of events, or a group of visitors.

    Args:
        events: None where only the lists are asked about: nobody has clicked then.
    """
    num_groups = 1 if events is None else min(num_buckets_of(events), _MAX_GROUPS)
    lists: list[list[Any]] = [[] for _ in range(num_groups)]
    deeds: list[list[Any]] = [[] for _ in range(num_groups)]
    counts: Counter[str] = Counter()

    def keep(pieces: list[list[Any]], references: list[Any]) -> Any:
        *found, last = references
        result = get(last)
        for group, piece in enumerate(found):
            pieces[group].append(piece)
        return result

    files = {uri: info for uri, info in log.items() if _may_hold(info, period)}
    load = ray.remote(load_lists).options(num_returns=num_groups + 1)
    loading = (load.remote(some, period, num_groups) for some in _share_out(files))
    for left_out in finish_in_order(loading, lambda references: keep(lists, references)):
        counts += left_out

    follow = ray.remote(load_events).options(num_returns=num_groups + 1)
    following = (
        follow.remote(some, period, num_groups, with_sessions=counts["of_sessions"] > 0)
        for some in ({} if events is None else files_by_bucket(events)).values()
    )
    finish_in_order(following, lambda references: keep(deeds, references))

    join = ray.remote(tally_group)
    joining = (
        join.remote(period, len(shown), *shown, *done)
        for shown, done in zip(lists, deeds, strict=True)
        if shown
    )
    return sum(finish_in_order(joining, get), NOTHING), counts


def judge(
    wanted: ExperimentConfig, arms: Arms, period: Period, found: Tally, counts: Mapping[str, int]
) -> dict[str, Any]:
    """The content of report.json. Raises: JobError when an arm has no two users."""
    control, treatment = found.control, found.treatment
    if min(control.num_users, treatment.num_users) < 2:
        raise JobError(
            f"{control.num_users} users saw only {arms.control} and {treatment.num_users} only "
            f"{arms.treatment}, {counts['too_young']} lists are too young to count; wait for more, "
            "ingest newer events, or begin the period earlier."
        )
    days = max(found.last_us - period.start_us, 1) / _DAY_US
    ratio = check_sample_ratio(control.num_users, treatment.num_users, arms.treatment_share)
    return {
        **asdict(arms),
        "primary": wanted.primary,
        "start": _iso(period.start_us),
        "until": _iso(min(period.until_us, found.last_us)),
        "days": days,
        "window_hours": wanted.window_hours,
        "before_days": wanted.before_days,
        "users": {"control": control.num_users, "treatment": treatment.num_users},
        "lists": {
            "control": round(control.total("lists")),
            "treatment": round(treatment.total("lists")),
        },
        "degraded_lists": {
            "control": round(control.total("degraded_lists")),
            "treatment": round(treatment.total("degraded_lists")),
        },
        "left_out": {
            "users_of_both": found.num_switched,
            "lists_without_visitor": counts["without_visitor"],
            "lists_too_young": counts["too_young"],
            "lists_of_other_versions": counts["of_other_versions"],
        },
        "sample_ratio": {**asdict(ratio), "share": ratio.share, "is_alarm": ratio.is_alarm},
        "wanted_uplift": wanted.wanted_uplift,
        "metrics": {
            metric: _compare(found, metric, days, wanted.wanted_uplift) for metric in METRICS
        },
    }


def _find_versions(wanted: ExperimentConfig, states: Sequence[Serving]) -> tuple[str, str]:
    """Control and treatment, by default of the last state with a canary."""
    if wanted.control is not None and wanted.treatment is not None:
        return wanted.control, wanted.treatment
    last = next((state for state in reversed(states) if state.shares), None)
    if last is None or len(last.shares) > 1:
        canaries = "no canary" if last is None else f"the canaries {', '.join(last.shares)}"
        raise JobError(
            f"The registry had {canaries}; name experiment.control and experiment.treatment."
        )
    (treatment,) = last.shares
    return last.champion, treatment


def _compare(found: Tally, metric: str, days: float, wanted_uplift: float) -> dict[str, Any]:
    """A metric as facts: as it is, and with the noise taken out that was there before."""
    plain = compare_arms(found.control, found.treatment, metric)
    uplift = compare_arms(*adjust(found.control, found.treatment, metric), metric)
    return {
        "meaning": METRICS[metric].meaning,
        **_interval("control", uplift.control.interval),
        **_interval("treatment", uplift.treatment.interval),
        **_interval("difference", uplift.difference),
        **_interval("relative", uplift.relative),
        **_interval("plain_difference", plain.difference),
        "p_value": uplift.p_value,
        "is_significant": uplift.is_significant,
        "variance_kept": uplift.variance / plain.variance if plain.variance else 1.0,
        "detectable": _finite(uplift.detectable),
        "days_needed": _finite(uplift.days_needed(days, wanted_uplift)),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(name: str, found: Interval | None) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _find_period(
    config: PipelineConfig, arms: Arms, log: Mapping[str, FileInfo], newest_us: int
) -> Period:
    wanted, options = config.experiment, config.storage.options
    window_us = round(wanted.window_hours * 3_600_000_000)
    now = datetime.now(UTC)
    end_us = _microseconds(now if wanted.end is None else min(wanted.end, now))
    start_us = (
        _first_shown(log, arms.treatment, options)
        if wanted.start is None
        else _microseconds(wanted.start)
    )
    return Period(
        arms.control,
        arms.treatment,
        start_us,
        # What the lake does not yet know of would count as no click.
        min(end_us, newest_us - window_us),
        end_us,
        window_us,
        round(wanted.before_days * _DAY_US),
        wanted.clicks,
        wanted.purchases,
        options,
    )


def _first_shown(log: Mapping[str, FileInfo], version: str, options: dict[str, str]) -> int:
    look = ray.remote(first_shown)
    looking = (look.remote(some, version, options) for some in _share_out(log))
    found = [moment for moment in finish_in_order(looking, get) if moment is not None]
    if not found:
        raise JobError(f"{version} gave no list that was logged; promote it with a share and wait.")
    first_us: int = min(found)
    return first_us


def _may_hold(file: FileInfo, period: Period) -> bool:
    """Whether a file may have lists of the period: they were shown before it was written."""
    start = datetime.fromtimestamp(period.start_us / 1e6, UTC)
    return bool(file.mtime is None or file.mtime >= start - _CLOCKS_DIFFER)


def _share_out(files: Mapping[str, FileInfo]) -> Iterator[list[str]]:
    """Files of the log, as many together as one task reads."""
    some: list[str] = []
    num_bytes = 0
    for uri, info in files.items():
        if some and (len(some) == _MAX_FILES or num_bytes + info.size > _MAX_BYTES):
            yield some
            some, num_bytes = [], 0
        some.append(uri)
        num_bytes += info.size
    if some:
        yield some


def _folder(config: PipelineConfig, arms: Arms) -> Path:
    root = expand(config.storage.root)
    if "://" in root:
        raise JobError(f"The report is written into a folder, not into {root}; set storage.root.")
    name = config.experiment.name or f"{arms.treatment}-over-{arms.control}"
    return Path(root) / "experiments" / name


def _publish_metrics(config: PipelineConfig, facts: Mapping[str, Any]) -> None:
    metrics = JobMetrics("experiment", config)
    for name, found in facts["metrics"].items():
        if found["relative"] is not None:
            metrics.set(
                "nextitem_experiment_uplift_ratio",
                found["relative"],
                "What the treatment's metric is above the control's, relative to it.",
                metric=name,
            )
    metrics.set(
        "nextitem_experiment_sample_ratio_alarm",
        facts["sample_ratio"]["is_alarm"],
        "1 where an arm has not its share of the users, so that no uplift can be read.",
    )
    metrics.publish()


def _report(facts: Mapping[str, Any], folder: Path) -> Report:
    primary = facts["metrics"][facts["primary"]]
    figures: dict[str, Any] = {
        "control": facts["control"],
        "treatment": facts["treatment"],
        "users_control": facts["users"]["control"],
        "users_treatment": facts["users"]["treatment"],
        "users_of_both": facts["left_out"]["users_of_both"],
        "sample_ratio_p_value": facts["sample_ratio"]["p_value"],
        "sample_ratio_alarm": facts["sample_ratio"]["is_alarm"],
        **{name: found["relative"] for name, found in facts["metrics"].items()},
        "primary": facts["primary"],
        "primary_low": primary["relative_low"],
        "primary_high": primary["relative_high"],
        "detectable": primary["detectable"],
        "days_needed": primary["days_needed"],
        "report": str(folder / "report.html"),
    }
    return Report("experiment", describe(facts), figures)


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6)


def _iso(moment_us: int) -> str:
    return datetime.fromtimestamp(moment_us / 1e6, UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    main(run, job="experiment")
