"""Brings raw logs into the Delta lake: events, and the items and users that they are about.

    python -m ray_jobs.ingest --config ml-1m

Safe to run again: a file whose bytes were ingested before is skipped, an event is taken once, and
events are committed together at the end of a run or not at all. Rows that cannot be read go to the
table `quarantine`, each with its reason.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pyarrow as pa
import ray
from deltalake import DeltaTable
from ray.exceptions import RayTaskError

from data_lake.errors import LakeError, SourceError
from data_lake.ingest import (
    MergeReport,
    PartReport,
    PartTask,
    SourceFile,
    Target,
    group_edges,
    load_events,
    load_part,
    look_at,
    merge_group,
)
from data_lake.normalise import check_mapped
from data_lake.schemas import (
    PARTITION,
    events_schema,
    items_schema,
    quarantine_schema,
    users_schema,
)
from data_lake.sources import list_files
from data_lake.tables import (
    commit_parts,
    create_table,
    files_by_bucket,
    has_transaction,
    last_metadata,
    upsert,
)
from ray_jobs.config import PipelineConfig, expand
from ray_jobs.job import Report, main, timed

_MAX_GROUPS = 64
"""Groups of buckets in one run: as many pieces come of a part, and so much is merged at once."""
_SOURCES = "nextitem.sources"


@dataclass(frozen=True)
class Input:
    """What feeds one table."""

    kind: str
    """events, items or users"""
    key: str
    target: Target
    table: DeltaTable
    quarantine: DeltaTable
    files: list[SourceFile]
    again: bool
    """Whether files count that were read before."""


def run(config: PipelineConfig) -> Report:
    """Ingests everything that is new. Raises: SourceError, TableError, ConflictError."""
    started = time.perf_counter()
    started_us = time.time_ns() // 1_000
    with timed("look at the sources"):
        found = {kind: _find_files(config, kind) for kind in ("items", "users", "events")}
    inputs = {kind: _open_input(config, kind, found[kind], started_us) for kind in found}

    figures: dict[str, Any] = {}
    for kind in ("items", "users"):
        with timed(kind):
            figures |= _ingest_attributes(inputs[kind])
    new = _only_new(inputs["events"])
    figures["files"] = len(new.files)
    figures["files_known_already"] = len(found["events"]) - len(new.files)
    if new.files:
        with timed("events"):
            figures |= _ingest_events(new)
    figures["events_version"] = new.table.version()
    figures["seconds"] = time.perf_counter() - started
    if not new.files:
        return Report("ingest", "every file of events was ingested before", figures)
    return Report("ingest", f"{figures['committed']:,} events committed", figures)


def _ingest_events(new: Input) -> dict[str, Any]:
    started = time.perf_counter()
    reports, merged = _load_and_merge(new)
    num_read = sum(report.num_read for report in reports)
    num_rejected = sum(report.num_rejected for report in reports)
    _refuse_empty(new, num_read)
    parts = [part for report in merged for part in report.parts]
    num_committed = sum(part.num_rows for part in parts)
    num_duplicates = sum(report.num_duplicates for report in merged)
    assert num_read == num_committed + num_duplicates + num_rejected

    # Quarantine first: should only it land, the next run knows, and events stay all or nothing.
    _commit_quarantine(new, reports)
    counts = {
        "read": num_read,
        "committed": num_committed,
        "duplicate": num_duplicates,
        "quarantined": num_rejected,
    }
    commit_parts(
        new.table,
        parts,
        metadata={f"nextitem.{name}": str(count) for name, count in counts.items()},
        transactions=[
            # Shared by all runs: of two at a time, which cannot see each other's events, one loses.
            ("ingest", new.target.started_us),
            *(file.transaction("events") for file in new.files),
        ],
    )
    return counts | {"rows_per_s": round(num_read / (time.perf_counter() - started))}


def _load_and_merge(new: Input) -> tuple[list[PartReport], list[MergeReport]]:
    """Parts to groups of buckets, then each group merged: two rounds of tasks, no shuffle."""
    num_groups = min(new.target.num_buckets, _MAX_GROUPS)
    edges = group_edges(new.target.num_buckets, num_groups)
    load = ray.remote(load_events).options(num_returns=1 + num_groups)
    loading = [load.remote(task, new.target, num_groups) for task in _tasks(new)]
    reporting = [references[0] for references in loading]

    existing = files_by_bucket(new.table)
    merge = ray.remote(merge_group)
    merging = [
        merge.remote(
            {b: existing[b] for b in range(edges[group], edges[group + 1]) if b in existing},
            new.target,
            *(references[1 + group] for references in loading),
        )
        for group in range(num_groups if loading else 0)
    ]
    # The pieces of a group may go as soon as it is merged.
    del loading
    return _get(reporting), _get(merging)


def _ingest_attributes(given: Input) -> dict[str, Any]:
    """Upserts items or users, unless the very same files were the last to come."""
    if not given.files:
        return {}
    kind = given.kind
    stamp = hashlib.sha256("".join(file.digest for file in given.files).encode()).hexdigest()
    if not given.again and last_metadata(given.table, _SOURCES) == stamp:
        return {f"{kind}_upserted": 0}

    tasks = _tasks(given)
    load = ray.remote(load_part).options(num_returns=2)
    loading = [load.remote(task, given.target) for task in tasks]
    reports: list[PartReport] = _get([report for report, _ in loading])
    tables: list[pa.Table] = _get([rows for _, rows in loading])
    _refuse_empty(given, sum(report.num_read for report in reports))
    _commit_quarantine(given, reports)

    # Sources in turn, for each may know other columns; the stamp says that all of them landed.
    by_source = groupby(zip(tasks, tables, strict=True), key=lambda pair: pair[0].source)
    rows = [pa.concat_tables(table for _, table in pairs) for _, pairs in by_source]
    for position, one in enumerate(rows, start=1):
        metadata = {_SOURCES: stamp} if position == len(rows) else {}
        upsert(given.table, one, given.key, metadata=metadata)
    figures = {f"{kind}_upserted": sum(table.num_rows for table in tables)}
    num_rejected = sum(report.num_rejected for report in reports)
    return figures | ({f"{kind}_quarantined": num_rejected} if num_rejected else {})


def _commit_quarantine(given: Input, reports: Sequence[PartReport]) -> None:
    parts = [report.quarantine for report in reports if report.quarantine is not None]
    if parts:
        transactions = [file.transaction(given.kind) for file in given.files]
        commit_parts(given.quarantine, parts, transactions=transactions)


def _tasks(given: Input) -> list[PartTask]:
    def is_quarantined(file: SourceFile) -> bool:
        known = has_transaction(given.quarantine, file.transaction(given.kind)[0])
        return known and not given.again

    parts = [
        (file.source, part, is_quarantined(file)) for file in given.files for part in file.parts
    ]
    return [
        PartTask(source, part, index, is_known)
        for index, (source, part, is_known) in enumerate(parts)
    ]


def _find_files(config: PipelineConfig, kind: str) -> list[SourceFile]:
    """All files of a table's sources, their columns checked; the same bytes come once."""
    schema, required = _schema(config, kind)
    options = config.storage.options
    found = []
    for source in getattr(config.ingest, kind):
        check_mapped(source, schema, required)
        found += [(source, path) for path in list_files(source, expand(source.path), options)]
    looking = ray.remote(look_at)
    files: list[SourceFile] = _get(
        [looking.remote(source, path, options) for source, path in found]
    )
    unique: dict[str, SourceFile] = {}
    for file in files:
        unique.setdefault(file.digest, file)
    return list(unique.values())


def _only_new(events: Input) -> Input:
    def is_new(file: SourceFile) -> bool:
        return events.again or not has_transaction(events.table, file.transaction("events")[0])

    return replace(events, files=[file for file in events.files if is_new(file)])


def _refuse_empty(given: Input, num_read: int) -> None:
    if num_read == 0:
        raise SourceError(
            f"{given.files[0].path} has no rows, as all new files of {given.kind}; check what was "
            "delivered."
        )


def _schema(config: PipelineConfig, kind: str) -> tuple[pa.Schema, tuple[str, ...]]:
    """Columns that a source may give, and those that it must."""
    ingest = config.ingest
    if kind == "events":
        required = ("user_id", "item_id", "event_type", "timestamp")
        ours = {"ingested_at", "arrival", PARTITION}
        events = events_schema(ingest.user_id, ingest.item_id)
        return pa.schema([field for field in events if field.name not in ours]), required
    if kind == "items":
        return items_schema(ingest.item_id), ("item_id",)
    users = users_schema(ingest.user_id)
    return users.remove(users.get_field_index(PARTITION)), ("user_id",)


def _open_input(
    config: PipelineConfig, kind: str, files: list[SourceFile], started_us: int
) -> Input:
    """Opens the tables, and creates them at first."""
    ingest, storage = config.ingest, config.storage
    schema, key, num_buckets = {
        "events": (events_schema(ingest.user_id, ingest.item_id), "event_id", ingest.num_buckets),
        "items": (items_schema(ingest.item_id), "item_id", None),
        "users": (users_schema(ingest.user_id), "user_id", ingest.num_buckets),
    }[kind]
    lake, options = storage.lake_uri, storage.options
    table = create_table(lake, kind, schema, options, num_buckets=num_buckets)
    quarantine = create_table(lake, "quarantine", quarantine_schema(), options)
    target = Target(lake, options, schema, ingest.num_buckets, started_us)
    return Input(kind, key, target, table, quarantine, files, ingest.again)


def _get(references: list[Any]) -> Any:
    """Results of tasks; what a task raised on purpose is raised here as it was."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, LakeError):
            raise error.cause from None
        raise


if __name__ == "__main__":
    main(run, job="ingest")
