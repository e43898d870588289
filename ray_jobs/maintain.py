"""Looks after the lake: forgets users, merges small files, deletes what no version needs.

    python -m ray_jobs.maintain --config synthetic --set 'maintain.forget=["u42"]'

In this order: forget, compact, vacuum, checkpoint, and a search of every file for the users who
were to be forgotten, which says of each "gone", or until when files still hold rows. Safe to run
again, and beside other jobs; one that is about to commit while users are forgotten is refused and
has to run again. `data_lake/maintenance.py` says what is out of reach.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

import ray

from data_lake.errors import TableError
from data_lake.maintenance import (
    LOG_RETENTION,
    TABLES,
    Trace,
    checkpoint,
    compact,
    count_files,
    find_in_folder,
    find_in_log,
    find_users,
    forget_in_folder,
    forget_users,
    run_here,
    vacuum,
)
from data_lake.owners import check_user_ids
from data_lake.tables import table_exists
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import ConfigError
from ray_jobs.job import Report, main, timed
from ray_jobs.job_metrics import JobMetrics
from ray_jobs.sections.storage import expand

_MAX_TASKS = 256

T = TypeVar("T")
R = TypeVar("R")


def run(config: PipelineConfig) -> Report:
    """Does every step that is not switched off; figures by table and by user.

    Raises: ConfigError when an id to forget does not fit; TableError when there is no lake;
        ConflictError when other jobs kept changing a table.
    """
    users = _users(config)
    tables = _tables(config)
    figures: dict[str, Any] = {}
    if users:
        with timed("forget"):
            figures |= _forget(config, tables, users)
    if config.maintain.compact:
        with timed("compact"):
            figures |= _compact(config, tables)
    if config.maintain.vacuum:
        with timed("vacuum"):
            figures |= _vacuum(config, tables)
    if config.maintain.checkpoint:
        with timed("checkpoint"):
            for name in tables:
                checkpoint(config.storage.lake_uri, name, config.storage.options)
    if config.maintain.prove and users:
        with timed("prove"):
            figures |= _prove(config, users)
    JobMetrics("maintain", config).publish()
    return Report("maintain", _headline(figures, users), figures)


def history_root(config: PipelineConfig) -> str:
    """Where materialize writes."""
    return f"{expand(config.storage.root)}/history"


def _folders(config: PipelineConfig) -> dict[str, str]:
    """Where Parquet files hold rows of users beside the lake."""
    return {"history": history_root(config), "exposures": config.storage.exposures_uri}


def _users(config: PipelineConfig) -> tuple[str, ...]:
    try:
        return check_user_ids(config.maintain.forget, config.ingest.user_id)
    except ValueError as error:
        raise ConfigError(f"maintain.forget does not fit: {error}") from None


def _tables(config: PipelineConfig) -> list[str]:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    tables = [name for name in TABLES if table_exists(lake_uri, name, options)]
    if not tables:
        raise TableError(f"There is no table in {lake_uri}; run ray_jobs.ingest first.")
    return tables


def _forget(
    config: PipelineConfig, tables: Sequence[str], users: tuple[str, ...]
) -> dict[str, int]:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    gone = {
        f"{name}_rows_forgotten": forget_users(lake_uri, name, users, options, run_on_cluster)
        for name in tables
        if name != "items"
    }
    return gone | {
        f"{name}_rows_forgotten": forget_in_folder(folder, users, options, run_on_cluster)
        for name, folder in _folders(config).items()
    }


def _compact(config: PipelineConfig, tables: Sequence[str]) -> dict[str, int]:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    figures = {}
    for name in tables:
        figures[f"{name}_files_before"] = count_files(lake_uri, name, options)
        compact(lake_uri, name, config.maintain.target_file_bytes, options, run_on_cluster)
        figures[f"{name}_files"] = count_files(lake_uri, name, options)
    return figures


def _vacuum(config: PipelineConfig, tables: Sequence[str]) -> dict[str, int]:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    hours = config.maintain.retention_hours
    return {f"{name}_files_deleted": len(vacuum(lake_uri, name, hours, options)) for name in tables}


def _prove(config: PipelineConfig, users: tuple[str, ...]) -> dict[str, str]:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    in_tables = find_users(lake_uri, users, options, run_on_cluster)
    in_folders = [
        find_in_folder(folder, users, options, run_on_cluster)
        for folder in _folders(config).values()
    ]
    in_log = find_in_log(lake_uri, users, options)
    retention = timedelta(hours=config.maintain.retention_hours)
    return {
        f"user {user}": _verdict(
            in_tables[user],
            sum(len(found[user]) for found in in_folders),
            in_log.get(user),
            retention,
        )
        for user in users
    }


def _verdict(
    traces: Sequence[Trace], num_exported: int, named_at: datetime | None, retention: timedelta
) -> str:
    """What is left of a user, and when it may go."""
    unneeded = [trace.since for trace in traces if not trace.is_live]
    num_live = len(traces) - len(unneeded) + num_exported
    left = []
    if num_live:
        left.append(f"{num_live} files in use hold rows or cannot be read, run this job again")
    if unneeded:
        moment = _iso(max(unneeded) + retention)
        left.append(f"{len(unneeded)} files hold rows until a vacuum after {moment}")
    if not left:
        left.append("gone")
    if named_at is not None:
        moment = _iso(named_at + LOG_RETENTION)
        left.append(f"the log may name the user until a checkpoint after {moment}")
    return "; ".join(left)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _headline(figures: dict[str, Any], users: Sequence[str]) -> str:
    def total(ending: str) -> int:
        return sum(value for name, value in figures.items() if name.endswith(ending))

    merged = total("_files_before") - total("_files")
    return (
        f"{len(users):,} users forgotten ({total('_rows_forgotten'):,} rows), {merged:,} files "
        f"fewer, {total('_files_deleted'):,} deleted"
    )


def run_on_cluster(function: Callable[[T], R], arguments: Sequence[T]) -> list[R]:
    """Calls a function once for each argument, in as many tasks as the cluster has room for."""
    if not arguments:
        return []
    size = -(-len(arguments) // _MAX_TASKS)
    shares = [arguments[start : start + size] for start in range(0, len(arguments), size)]
    call = ray.remote(run_here)
    results: list[list[R]] = ray.get([call.remote(function, share) for share in shares])
    return [result for share in results for result in share]


if __name__ == "__main__":
    main(run, job="maintain")
