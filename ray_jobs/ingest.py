"""Brings raw logs into the Delta lake: events, and the items and users that they are about.

    python -m ray_jobs.ingest --config ml-1m

Safe to run again: a file whose bytes were ingested before is skipped, an event is taken once, and
events are committed together at the end of a run or not at all. What serving has shipped to
`<storage root>/landing` is read too, without being configured. Two runs at a time both land: the
slower one leaves out what the other has brought. Rows that cannot be read go to the table
`quarantine`, each with its reason.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any

import pyarrow as pa
import ray
from deltalake import DeltaTable

from data_lake.errors import ConflictError, SourceError
from data_lake.exchange import Files, MergeReport, drop_known
from data_lake.freshness import newest_event
from data_lake.ingest import PartReport, PartTask, SourceFile, Target, load_rows, look_at
from data_lake.landing import delete_landed, has_landed, landing_source
from data_lake.normalise import check_mapped
from data_lake.schemas import (
    PARTITION,
    events_schema,
    items_schema,
    quarantine_schema,
    users_schema,
)
from data_lake.sources import list_files
from data_lake.tables import Part as WrittenPart
from data_lake.tables import (
    commit_parts,
    create_table,
    files_by_bucket,
    has_transaction,
    last_metadata,
    upsert,
)
from data_lake.withdrawal import WITHDRAWN, Delivery, write_note
from data_lake.written import Written
from ray_jobs.config import PipelineConfig
from ray_jobs.exchange import exchange_by_shuffle, exchange_pieces, finish_in_order, get
from ray_jobs.job import Report, main, timed
from ray_jobs.job_metrics import JobMetrics
from ray_jobs.sections.storage import expand

_MAX_ROUNDS = 10
"""Times that a run makes room for others that have committed before it."""
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
    landing_uri: str
    """Where serving ships its events to."""
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
    figures |= _delete_landed(config, inputs["events"], new)
    figures["ingested_at"] = Delivery("", "", 0, 0, started_us).ingested_at.isoformat()
    figures["events_version"] = new.table.version()
    figures["seconds"] = time.perf_counter() - started
    _publish(config, figures, new.table)
    if not new.files:
        return Report("ingest", "every file of events was ingested before", figures)
    return Report("ingest", f"{figures['committed']:,} events committed", figures)


def _publish(config: PipelineConfig, figures: dict[str, Any], events: DeltaTable) -> None:
    metrics = JobMetrics("ingest", config)
    num_read, num_quarantined = figures.get("read", 0), figures.get("quarantined", 0)
    metrics.set("nextitem_ingest_rows", num_read, "Rows of events that the last run read.")
    metrics.set(
        "nextitem_ingest_quarantined_ratio",
        num_quarantined / num_read if num_read else 0.0,
        "Share of these rows that went to quarantine.",
    )
    newest = newest_event(events)
    if newest is not None:
        metrics.set(
            "nextitem_newest_event_age_seconds",
            time.time() - newest.timestamp(),
            "Time since the newest event of the lake.",
        )
    metrics.publish()


def _ingest_events(new: Input) -> dict[str, Any]:
    started = time.perf_counter()
    is_foreign = any(file.source.format == "delta" for file in new.files)
    exchange = exchange_by_shuffle if is_foreign else exchange_pieces
    with Written(new.target.lake_uri, new.target.options) as written:
        existing = files_by_bucket(new.table)
        exchanged = exchange(_tasks(new), new.target, existing, written)
        num_read = sum(report.num_read for report in exchanged.loaded)
        _refuse_empty(new, num_read)
        # Quarantine first: should only it land, the next run knows, and events stay all or nothing.
        _commit_quarantine(new, exchanged.loaded, written)
        counts = _commit_events(new, exchanged.loaded, exchanged.merged, written)
    return counts | {"rows_per_s": round(num_read / (time.perf_counter() - started))}


def _commit_events(
    new: Input, loaded: Sequence[PartReport], merged: Sequence[MergeReport], written: Written
) -> dict[str, int]:
    """Commits what was merged, and returns what became of the rows that were read.

    Another run that was faster is made room for: what it has brought is left out here.
    """
    seen = files_by_bucket(new.table)
    withdrawn = new.table.transaction_version(WITHDRAWN)
    for _ in range(_MAX_ROUNDS):
        parts = [part for report in merged for part in report.parts]
        counts = _count_rows(loaded, merged)
        # What a commit holds is never deleted, not even when it is not known whether it landed.
        written.forget("events", parts)
        try:
            commit_parts(
                new.table,
                parts,
                metadata={f"nextitem.{name}": str(count) for name, count in counts.items()}
                | write_note(_deliveries(new), counts["duplicate"]),
                transactions=[
                    # Shared by all runs: of two at a time, which cannot see each other's events,
                    # the slower one has to look again.
                    ("ingest", new.target.started_us),
                    *(file.transaction("events") for file in new.files),
                ],
            )
            return counts
        except ConflictError as error:
            conflict = error
        new.table.update_incremental()
        if _has_landed(new.table, parts):
            return counts
        written.add("events", *parts)
        if new.table.transaction_version(WITHDRAWN) != withdrawn:
            # What was left out as known may be known no more.
            raise ConflictError(
                f"Rows were withdrawn from {new.table.table_uri} meanwhile; run this job again."
            )
        found = files_by_bucket(new.table)
        merged = _drop_arrived(new, merged, _added(seen, found), written)
        seen = found
    raise conflict


def _has_landed(table: DeltaTable, parts: Sequence[WrittenPart]) -> bool:
    """Whether a commit that was reported as lost was written all the same, as stores that repeat a
    request may do.
    """
    return bool(parts) and any(uri.endswith(parts[0].path) for uri in table.file_uris())


def _added(before: Files, after: Files) -> dict[int, list[str]]:
    """Files of each bucket that were not there before."""
    return {bucket: sorted(set(after[bucket]) - set(before.get(bucket, ()))) for bucket in after}


def _drop_arrived(
    new: Input, merged: Sequence[MergeReport], arrived: Files, written: Written
) -> list[MergeReport]:
    """What was merged without the events that stand in files which arrived since."""
    parts = [part for report in merged for part in report.parts]
    touched = [
        (part, arrived[part.bucket])
        for part in parts
        if part.bucket is not None and arrived.get(part.bucket)
    ]

    def finish(reference: Any) -> MergeReport:
        report: MergeReport = get(reference)
        written.add("events", *report.parts)
        return report

    drop = ray.remote(drop_known)
    dropping = (drop.remote(part, files, new.target) for part, files in touched)
    dropped = finish_in_order(dropping, finish)

    changing = {part.path for part, _ in touched}
    kept = [part for part in parts if part.path not in changing]
    after = [MergeReport(kept, sum(report.num_duplicates for report in merged)), *dropped]
    staying = {part.path for report in after for part in report.parts}
    written.delete("events", [part for part in parts if part.path not in staying])
    return after


def _count_rows(loaded: Sequence[PartReport], merged: Sequence[MergeReport]) -> dict[str, int]:
    counts = {
        "read": sum(report.num_read for report in loaded),
        "committed": sum(part.num_rows for report in merged for part in report.parts),
        "duplicate": sum(report.num_duplicates for report in merged),
        "quarantined": sum(report.num_rejected for report in loaded),
    }
    assert counts["read"] == counts["committed"] + counts["duplicate"] + counts["quarantined"]
    return counts


def _ingest_attributes(given: Input) -> dict[str, Any]:
    """Upserts items or users, unless the very same files were the last to come."""
    if not given.files:
        return {}
    kind = given.kind
    stamp = hashlib.sha256("".join(file.digest for file in given.files).encode()).hexdigest()
    if not given.again and last_metadata(given.table, _SOURCES) == stamp:
        return {f"{kind}_upserted": 0}

    tasks = _tasks(given)
    with Written(given.target.lake_uri, given.target.options) as written:
        reports, tables = _load_rows(tasks, given.target, written)
        _refuse_empty(given, sum(report.num_read for report in reports))
        _commit_quarantine(given, reports, written)

    # Sources in turn, for each may know other columns; the stamp says that all of them landed.
    by_source = groupby(zip(tasks, tables, strict=True), key=lambda pair: pair[0].source)
    rows = [pa.concat_tables(table for _, table in pairs) for _, pairs in by_source]
    for position, one in enumerate(rows, start=1):
        _upsert(given, one, {_SOURCES: stamp} if position == len(rows) else {})
    figures = {f"{kind}_upserted": sum(table.num_rows for table in tables)}
    num_rejected = sum(report.num_rejected for report in reports)
    return figures | ({f"{kind}_quarantined": num_rejected} if num_rejected else {})


def _load_rows(
    tasks: Sequence[PartTask], target: Target, written: Written
) -> tuple[list[PartReport], list[pa.Table]]:
    def finish(reference: Any) -> tuple[list[PartReport], pa.Table]:
        reports, rows = get(reference)
        written.add("quarantine", *(report.quarantine for report in reports))
        return reports, rows

    load = ray.remote(load_rows)
    loaded = finish_in_order((load.remote(task, target) for task in tasks), finish)
    return [report for reports, _ in loaded for report in reports], [rows for _, rows in loaded]


def _upsert(given: Input, rows: pa.Table, metadata: dict[str, str]) -> None:
    for _ in range(_MAX_ROUNDS):
        try:
            upsert(given.table, rows, given.key, metadata=metadata)
            return
        except ConflictError as error:
            conflict = error
        given.table.update_incremental()
    raise conflict


def _commit_quarantine(given: Input, reports: Sequence[PartReport], written: Written) -> None:
    """Commits the bad rows of each file unless another run, at the same time, has done so."""
    files = list(given.files)
    for _ in range(_MAX_ROUNDS):
        staying = {file.digest for file in files}
        found = [(report.digest, report.quarantine) for report in reports if report.quarantine]
        parts = [part for digest, part in found if digest in staying]
        written.delete("quarantine", [part for digest, part in found if digest not in staying])
        if not parts:
            return
        written.forget("quarantine", parts)
        try:
            transactions = [file.transaction(given.kind) for file in files]
            note = write_note(_deliveries(given)) if given.kind == "events" else {}
            commit_parts(given.quarantine, parts, metadata=note, transactions=transactions)
            return
        except ConflictError as error:
            conflict = error
        was_known = {file.digest for file in files if _is_quarantined(given, file)}
        given.quarantine.update_incremental()
        if _has_landed(given.quarantine, parts):
            return
        written.add("quarantine", *parts)
        files = [
            file for file in files if file.digest in was_known or not _is_quarantined(given, file)
        ]
    raise conflict


def _is_quarantined(given: Input, file: SourceFile) -> bool:
    return has_transaction(given.quarantine, file.transaction(given.kind)[0])


def _tasks(given: Input) -> list[PartTask]:
    tasks: list[PartTask] = []
    for file in given.files:
        is_known = _is_quarantined(given, file) and not given.again
        for part in file.parts:
            tasks.append(PartTask(file.source, part, len(tasks), file.digest, is_known))
    return tasks


def _deliveries(given: Input) -> list[Delivery]:
    """The files of a run with the places of their parts; those that serving has shipped as one."""
    found: list[Delivery] = []
    first, started_us = 0, given.target.started_us
    for file in given.files:
        num_parts = len(file.parts)
        if file.source.path != given.landing_uri:
            found.append(Delivery(file.path, file.digest, first, num_parts, started_us))
        elif found and found[-1].path == given.landing_uri:
            found[-1] = replace(found[-1], num_parts=found[-1].num_parts + num_parts)
        else:
            found.append(Delivery(given.landing_uri, "", first, num_parts, started_us))
        first += num_parts
    return found


def _find_files(config: PipelineConfig, kind: str) -> list[SourceFile]:
    """All files of a table's sources, their columns checked; the same bytes come once."""
    schema, required = _schema(config, kind)
    options = config.storage.options
    found = []
    sources = list(getattr(config.ingest, kind))
    landing = config.storage.landing_uri
    if kind == "events" and has_landed(landing, options):
        sources.append(landing_source(landing))
    for source in sources:
        check_mapped(source, schema, required)
        found += [(source, path) for path in list_files(source, expand(source.path), options)]
    look = ray.remote(look_at)
    looking = (look.remote(source, path, options) for source, path in found)
    files: list[SourceFile] = finish_in_order(looking, get)
    unique: dict[str, SourceFile] = {}
    for file in files:
        unique.setdefault(file.digest, file)
    return list(unique.values())


def _only_new(events: Input) -> Input:
    def is_new(file: SourceFile) -> bool:
        return events.again or not has_transaction(events.table, file.transaction("events")[0])

    return replace(events, files=[file for file in events.files if is_new(file)])


def _delete_landed(config: PipelineConfig, found: Input, new: Input) -> dict[str, int]:
    """Deletes files of served events that earlier runs have brought into the lake."""
    landing = config.storage.landing_uri
    fresh = {file.digest for file in new.files}
    known = [
        file.path
        for file in found.files
        if file.source.path == landing and file.digest not in fresh
    ]
    if not known:
        return {}
    before = datetime.now(UTC) - timedelta(hours=config.ingest.keep_landed_hours)
    num_deleted = delete_landed(landing, known, before, config.storage.options)
    return {"landed_files_deleted": num_deleted}


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
        events = events_schema(ingest.user_id, ingest.item_id, ingest.context)
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
    events = events_schema(ingest.user_id, ingest.item_id, ingest.context)
    schema, key, num_buckets = {
        "events": (events, "event_id", ingest.num_buckets),
        "items": (items_schema(ingest.item_id), "item_id", None),
        "users": (users_schema(ingest.user_id), "user_id", ingest.num_buckets),
    }[kind]
    lake, options = storage.lake_uri, storage.options
    table = create_table(lake, kind, schema, options, num_buckets=num_buckets)
    quarantine = create_table(lake, "quarantine", quarantine_schema(), options)
    target = Target(lake, options, pa.schema(table.schema()), ingest.num_buckets, started_us)
    landing = storage.landing_uri
    return Input(kind, key, target, table, quarantine, files, landing, ingest.again)


if __name__ == "__main__":
    main(run, job="ingest")
