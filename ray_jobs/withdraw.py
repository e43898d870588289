"""Takes a delivery out of the lake again: the rows of events and of quarantine that came with a
broken feed, before it is delivered anew.

    python -m ray_jobs.withdraw --config synthetic --dry-run
    python -m ray_jobs.withdraw --config synthetic --set withdraw.retrain=2026-W47

A dry run counts the rows; where nothing is named it lists what came in but for served events,
newest first. Exactly those rows go, in one commit a table; what other runs bring meanwhile stays. A
run that was killed goes on when it is started again. Sequences, histories and lists follow at their
next build.

The files stay known: the same bytes are not ingested again (`ingest.again` does), corrected ones
are, under whatever name. Deliver them afterwards: an ingest under way is told to run again. See
`data_lake/withdrawal.py` for what cannot be undone.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any

from data_lake.tables import open_table, table_exists
from data_lake.withdrawal import (
    TABLES,
    Delivery,
    count_delivered,
    count_duplicates_since,
    read_deliveries,
    withdraw,
)
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main, timed
from ray_jobs.maintain import run_on_cluster
from ray_jobs.retraining.state import State, read_state, retrains_folder
from ray_jobs.sections.storage import expand
from ray_jobs.sections.upkeep import WithdrawConfig

_MAX_LISTED = 50


def run(config: PipelineConfig) -> Report:
    """Takes out what is named. Raises: JobError when that is nothing; TableError, ConflictError."""
    chosen = choose(config)
    lake_uri, options = config.storage.lake_uri, config.storage.options
    figures: dict[str, Any] = {"files": len({one.path for one in chosen})}
    for name in TABLES:
        with timed(name):
            figures[f"{name}_rows_withdrawn"] = withdraw(
                lake_uri, name, chosen, options, run_on_cluster
            )
    figures["duplicates_since"] = _count_duplicates(config, chosen)
    return Report("withdraw", _headline(figures), figures)


def preview(config: PipelineConfig) -> dict[str, Any]:
    """Which files would be withdrawn with how many rows; what there is, where none is named."""
    if not _names_any(config.withdraw):
        # Served events come every hour, and would be all that is listed.
        landing = config.storage.landing_uri
        return {"delivered": _list([one for one in _delivered(config) if one.path != landing])}
    chosen = choose(config)
    lake_uri, options = config.storage.lake_uri, config.storage.options
    rows = {f"{name}_rows": count_delivered(lake_uri, name, chosen, options) for name in TABLES}
    return {
        "withdraw": _list(chosen),
        "files": len({one.path for one in chosen}),
        **rows,
        "duplicates_since": _count_duplicates(config, chosen),
    }


def choose(config: PipelineConfig) -> list[Delivery]:
    """What is named. Raises: JobError where that is nothing, or nothing that is known."""
    wanted = config.withdraw
    if not _names_any(wanted):
        raise JobError(
            "Nothing is named to be withdrawn; set withdraw.retrain, withdraw.run or "
            "withdraw.files. --dry-run lists what came in."
        )
    runs = _find_runs(config)
    chosen = [
        one
        for one in _delivered(config)
        if (runs is None or one.ingested_us in runs) and _is_named(one, config)
    ]
    if not chosen:
        raise JobError(
            f"No file that was ingested fits {_describe(wanted)}; --dry-run without it lists what "
            "came in, as far back as the log of events reaches (30 days)."
        )
    return [*chosen, *_cut_short(config, chosen)]


def _cut_short(config: PipelineConfig, chosen: Sequence[Delivery]) -> list[Delivery]:
    """Of the same bytes: what earlier runs put into quarantine, and no more, for they were cut
    short then.
    """
    came = {(one.digest, one.ingested_us) for one in _delivered_to(config, "events")}
    digests = {one.digest for one in chosen if one.digest}
    return [
        one
        for one in _delivered_to(config, "quarantine")
        if one.digest in digests and (one.digest, one.ingested_us) not in came
    ]


def _names_any(wanted: WithdrawConfig) -> bool:
    return bool(wanted.retrain or wanted.run or wanted.files)


def _find_runs(config: PipelineConfig) -> set[int] | None:
    """The ingest runs that are named, microseconds in UTC; None: all of them."""
    wanted = config.withdraw
    runs: list[set[int]] = []
    if wanted.run is not None:
        runs.append({_microseconds(wanted.run)})
    if wanted.retrain is not None:
        runs.append({_run_of(config, wanted.retrain)})
    return set.intersection(*runs) if runs else None


def _run_of(config: PipelineConfig, name: str) -> int:
    """When the ingest of a refused retraining began. Raises: JobError for any other one."""
    state = read_state(retrains_folder(config) / name)
    if state is None:
        raise JobError(
            f"There is no retraining {name!r} below {expand(config.storage.root)}; correct "
            "withdraw.retrain."
        )
    _refuse_passed(state)
    figures = state.steps["ingest"].figures if "ingest" in state.steps else {}
    if not figures.get("files") or "ingested_at" not in figures:
        raise JobError(
            f"The ingest of the retraining {name} brought no files, for another run had them "
            "before; name these with withdraw.files. --dry-run lists what came in."
        )
    return _microseconds(datetime.fromisoformat(figures["ingested_at"]))


def _refuse_passed(state: State) -> None:
    by_data = state.steps["data"].verdicts if "data" in state.steps else ()
    if all(verdict.passed for verdict in by_data):
        raise JobError(
            f"The retraining {state.name} was not refused by a gate of its data, so nothing says "
            "that they are broken; if they are, name them with withdraw.files."
        )


def _is_named(one: Delivery, config: PipelineConfig) -> bool:
    """By its whole path or the last step of it; no pattern: everything but served events."""
    patterns = [expand(pattern) if "/" in pattern else pattern for pattern in config.withdraw.files]
    if not patterns:
        return one.path != config.storage.landing_uri
    names = (one.path, one.path.rpartition("/")[2])
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _delivered(config: PipelineConfig) -> list[Delivery]:
    """Everything that the logs have a note of, the newest run first."""
    found = [one for name in TABLES for one in _delivered_to(config, name)]
    return sorted(found, key=lambda one: -one.ingested_us)


def _delivered_to(config: PipelineConfig, name: str) -> list[Delivery]:
    """What the log of one table has a note of."""
    lake_uri, options = config.storage.lake_uri, config.storage.options
    if not table_exists(lake_uri, name, options):
        return []
    return read_deliveries(open_table(lake_uri, name, options))


def _list(deliveries: Sequence[Delivery]) -> list[dict[str, Any]]:
    """The first of them for a person, each file of a run once though two tables have its rows."""
    files = {(one.path, one.ingested_us): one for one in deliveries}
    return [one.facts() for one in files.values()][:_MAX_LISTED]


def _count_duplicates(config: PipelineConfig, chosen: Sequence[Delivery]) -> int:
    events = open_table(config.storage.lake_uri, "events", config.storage.options)
    runs = {one.ingested_us for one in chosen}
    ours = [one for one in read_deliveries(events) if one.ingested_us in runs]
    return count_duplicates_since(events, ours) if ours else 0


def _headline(figures: dict[str, Any]) -> str:
    num_rows = sum(figures[f"{name}_rows_withdrawn"] for name in TABLES)
    headline = f"{num_rows:,} rows of {figures['files']:,} files withdrawn"
    if figures["duplicates_since"]:
        headline += (
            f"; later runs left out {figures['duplicates_since']:,} rows as known, some perhaps by "
            "these: if so, deliver their files again with ingest.again"
        )
    return headline


def _describe(wanted: WithdrawConfig) -> str:
    given = wanted.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"withdraw.{name} = {value!r}" for name, value in given.items())


def _microseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


if __name__ == "__main__":
    main(run, job="withdraw", preview=preview)
