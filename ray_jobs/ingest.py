"""Brings raw logs into the Delta lake: events, and the items and users that they are about.

    python -m ray_jobs.ingest --config ml-1m

Safe to run again: a file whose bytes were ingested before is skipped, an event is taken once, and
events are committed together at the end of a run or not at all. Rows that cannot be read go to the
table `quarantine`, each with its reason.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from deltalake import DeltaTable

from data_lake.errors import SourceError
from data_lake.ingest import (
    MergeReport,
    PartReport,
    PartTask,
    Target,
    load_part,
    merge_group,
    now_us,
    write_rejected,
)
from data_lake.normalise import check_mapped, normalise
from data_lake.schemas import events_schema, items_schema, quarantine_schema, users_schema
from data_lake.sources import SourceConfig, cut_file, digest_file, list_files, read_part
from data_lake.tables import (
    commit_parts,
    create_table,
    files_by_bucket,
    has_transaction,
    upsert,
)
from ray_jobs.config import PipelineConfig, expand
from ray_jobs.job import Report, main, timed

_REQUIRED = ("user_id", "item_id", "event_type", "timestamp")


@dataclass(frozen=True)
class Tables:
    """The tables that an ingest writes."""

    events: DeltaTable
    items: DeltaTable
    users: DeltaTable
    quarantine: DeltaTable


@dataclass(frozen=True)
class SourceFile:
    """A file that is new to the lake."""

    source: SourceConfig
    path: str
    digest: str

    @property
    def transaction(self) -> tuple[str, int]:
        """Under which the log remembers the file."""
        return f"ingest:{self.digest}", 1


def run(config: PipelineConfig) -> Report:
    """Ingests everything that is new. Raises: SourceError, TableError, ConflictError."""
    started = time.perf_counter()
    _check_sources(config)
    every_file = _find_files(config.ingest.events)
    target = _target(config)
    tables = _create_tables(config, target)
    files = [file for file in every_file if not has_transaction(tables.events, file.transaction[0])]

    with timed("items and users"):
        num_items = _upsert_all(config, config.ingest.items, tables.items, "item_id", target)
        num_users = _upsert_all(config, config.ingest.users, tables.users, "user_id", target)
    figures: dict[str, Any] = {
        "files": len(files),
        "files_known_already": len(every_file) - len(files),
        "items_upserted": num_items,
        "users_upserted": num_users,
    }
    if files:
        figures |= _ingest_events(files, tables, target)
    figures["events_version"] = tables.events.version()
    figures["seconds"] = time.perf_counter() - started
    if not files:
        return Report("ingest", "every file was ingested before, nothing to do", figures)
    return Report("ingest", f"{figures['committed']:,} events committed", figures)


def _ingest_events(files: list[SourceFile], tables: Tables, target: Target) -> dict[str, int]:
    started = time.perf_counter()
    reports, merged = _shuffle(_cut(files), files_by_bucket(tables.events), target)
    num_read = sum(report.num_read for report in reports)
    num_rejected = sum(report.num_rejected for report in reports)
    if num_read == 0:
        raise SourceError(f"{files[0].path} has no rows; check what was delivered.")
    parts = [part for report in merged for part in report.parts]
    num_committed = sum(part.num_rows for part in parts)
    num_duplicates = sum(report.num_duplicates for report in merged)
    assert num_read == num_committed + num_duplicates + num_rejected

    # Quarantine first: when only it lands, the next run knows, and events stay all or nothing.
    transactions = [file.transaction for file in files]
    bad = [report.quarantine for report in reports if report.quarantine is not None]
    if bad and not has_transaction(tables.quarantine, transactions[0][0]):
        commit_parts(tables.quarantine, bad, transactions=transactions)
    metadata = {"nextitem.ingest": f"{num_committed} events of {len(files)} files"}
    commit_parts(tables.events, parts, metadata=metadata, transactions=transactions)
    return {
        "read": num_read,
        "committed": num_committed,
        "duplicate": num_duplicates,
        "quarantined": num_rejected,
        "rows_per_s": round(num_read / (time.perf_counter() - started)),
    }


def _shuffle(
    tasks: list[PartTask], existing: dict[int, list[str]], target: Target
) -> tuple[list[PartReport], list[MergeReport]]:
    """Parts to groups of buckets, then each group merged: two rounds of tasks, no sort between."""
    num_groups = min(target.num_buckets, max(1, 2 * int(ray.cluster_resources()["CPU"])))
    load = ray.remote(_load).options(num_returns=1 + num_groups)
    loaded = [load.remote(task, target, num_groups) for task in tasks]
    # Ray's bundles are lists of one reference for the report and one for each group.
    merge = ray.remote(_merge)
    merging = [
        merge.remote(
            {bucket: files for bucket, files in existing.items() if bucket % num_groups == group},
            target,
            *(references[1 + group] for references in loaded),
        )
        for group in range(num_groups)
    ]
    reports = ray.get([references[0] for references in loaded])
    return reports, ray.get(merging)


def _load(task: PartTask, target: Target, num_groups: int) -> tuple[Any, ...]:
    report, groups = load_part(task, target, num_groups)
    return report, *groups


def _merge(existing: dict[int, list[str]], target: Target, *pieces: pa.Table) -> MergeReport:
    return merge_group(pieces, existing, target)


def _cut(files: Iterable[SourceFile]) -> list[PartTask]:
    parts = [(file.source, part) for file in files for part in cut_file(file.source, file.path)]
    return [PartTask(source, part, index) for index, (source, part) in enumerate(parts)]


def _find_files(sources: Sequence[SourceConfig]) -> list[SourceFile]:
    found = [
        (source, path) for source in sources for path in list_files(source, expand(source.path))
    ]
    digests = ray.get([ray.remote(digest_file).remote(path) for _, path in found])
    files = [SourceFile(*pair, digest) for pair, digest in zip(found, digests, strict=True)]
    # The same bytes under two names are one file.
    return list({file.digest: file for file in reversed(files)}.values())[::-1]


def _upsert_all(
    config: PipelineConfig,
    sources: Sequence[SourceConfig],
    table: DeltaTable,
    key: str,
    target: Target,
) -> int:
    schema = items_schema(config.ingest.item_id) if key == "item_id" else _users(config)
    files = [
        file for file in _find_files(sources) if not has_transaction(table, file.transaction[0])
    ]
    rows = [_read_small(task, replace(target, schema=schema)) for task in _cut(files)]
    if not rows:
        return 0
    transactions = [file.transaction for file in files]
    merged = upsert(table, pa.concat_tables(rows), key, transactions=transactions)
    return int(merged["num_target_rows_inserted"] + merged["num_target_rows_updated"])


def _read_small(task: PartTask, target: Target) -> pa.Table:
    checked = normalise(read_part(task.source, task.part), task.source, target.schema)
    part = write_rejected(checked.rejected, task, target)
    if part is not None:
        quarantine = create_table(
            target.lake_uri, "quarantine", quarantine_schema(), target.options
        )
        commit_parts(quarantine, [part])
    missing = [field for field in target.schema if field.name not in checked.rows.column_names]
    rows = checked.rows
    for field in missing:
        rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(target.schema.names)


def _users(config: PipelineConfig) -> pa.Schema:
    schema = users_schema(config.ingest.user_id)
    return schema.remove(schema.get_field_index("user_bucket"))


def _check_sources(config: PipelineConfig) -> None:
    ingest = config.ingest
    for source in ingest.events:
        check_mapped(source, events_schema(ingest.user_id, ingest.item_id), _REQUIRED)
    for source in ingest.items:
        check_mapped(source, items_schema(ingest.item_id), ("item_id",))
    for source in ingest.users:
        check_mapped(source, _users(config), ("user_id",))


def _target(config: PipelineConfig) -> Target:
    ingest, storage = config.ingest, config.storage
    schema = events_schema(ingest.user_id, ingest.item_id)
    return Target(storage.lake_uri, storage.options, schema, ingest.num_buckets, now_us())


def _create_tables(config: PipelineConfig, target: Target) -> Tables:
    ingest, lake, options = config.ingest, target.lake_uri, target.options
    buckets = ingest.num_buckets
    return Tables(
        events=create_table(lake, "events", target.schema, options, num_buckets=buckets),
        items=create_table(lake, "items", items_schema(ingest.item_id), options),
        users=create_table(
            lake, "users", users_schema(ingest.user_id), options, num_buckets=buckets
        ),
        quarantine=create_table(lake, "quarantine", quarantine_schema(), options),
    )


if __name__ == "__main__":
    main(run, job="ingest")
