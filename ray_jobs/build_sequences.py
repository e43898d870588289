"""Builds the sequences table: one row a user, from whole buckets of events, in one commit.

    python -m ray_jobs.build_sequences --config synthetic

Safe to run again: while events, users and rules are the same it does nothing.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from deltalake import DeltaTable

from data_lake.errors import TableError
from data_lake.schemas import PARTITION, id_type_of, sequences_schema
from data_lake.sequences import (
    EVENT_COLUMNS,
    USER_COLUMNS,
    SequencesConfig,
    build_sequences,
    count_items,
    find_rare_items,
)
from data_lake.tables import (
    Part,
    commit_parts,
    create_table,
    files_by_bucket,
    num_buckets_of,
    open_table,
    read_files,
    table_exists,
    write_part,
)
from ray_jobs.config import PipelineConfig
from ray_jobs.job import Report, main, timed

_STAMP = "nextitem.sequences"
_FILE_COLUMNS = [name for name in EVENT_COLUMNS if name != PARTITION]


@dataclass(frozen=True)
class Sources:
    """The tables that sequences are made of; users are optional."""

    lake_uri: str
    options: Mapping[str, str]
    events: DeltaTable
    users: DeltaTable | None

    def stamp(self, rules: SequencesConfig) -> dict[str, Any]:
        """What the sequences depend on: they are new while this is the same."""
        return {
            "events_version": self.events.version(),
            "users_version": self.users.version() if self.users else None,
            "rules": rules.digest(),
        }


@dataclass(frozen=True)
class Built:
    """What the tasks wrote, nothing of it committed yet."""

    parts: list[Part]
    counts: Counter[str]
    lengths: Counter[int]
    """How many users have how many positions."""


def run(config: PipelineConfig) -> Report:
    """Builds, commits once and says what each rule removed.

    Raises: TableError when events are missing or empty, or when the rules leave nobody.
    """
    sources = _open_sources(config)
    stamp = sources.stamp(config.sequences)
    if _last_stamp(sources) == stamp:
        return Report("build_sequences", "events and rules are unchanged, nothing to do", stamp)

    buckets = files_by_bucket(sources.events)
    with timed("count items"):
        rare_items = _find_rare_items(sources, buckets, config.sequences)
    with timed("build sequences"):
        built = _build(sources, buckets, config.sequences, rare_items)
    if not built.parts:
        raise TableError(
            f"The rules in [sequences] leave no user of {built.counts['users_read']:,}; loosen "
            "them, e.g. min_user_events."
        )
    version = commit_parts(
        _create_sequences(sources),
        built.parts,
        mode="overwrite",
        metadata={_STAMP: json.dumps(stamp)},
    )
    figures = _figures(built) | stamp | {"sequences_version": version}
    return Report("build_sequences", f"{built.counts['users_kept']:,} sequences", figures)


def _open_sources(config: PipelineConfig) -> Sources:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    events = open_table(lake_uri, "events", options)
    if not events.file_uris():
        raise TableError(
            f"The table 'events' in {lake_uri} has no rows; check [ingest] and run ray_jobs.ingest."
        )
    has_users = table_exists(lake_uri, "users", options)
    users = open_table(lake_uri, "users", options) if has_users else None
    return Sources(lake_uri, options, events, users)


def _last_stamp(sources: Sources) -> dict[str, Any] | None:
    """What the newest sequences were built from, None without any."""
    if not table_exists(sources.lake_uri, "sequences", sources.options):
        return None
    return read_stamp(open_table(sources.lake_uri, "sequences", sources.options))


def read_stamp(sequences: DeltaTable) -> dict[str, Any] | None:
    """Versions and rules that this version of the sequences table was built from."""
    # Maintenance commits (compaction, vacuum) may stand above the one that we look for.
    stamps = (commit[_STAMP] for commit in sequences.history() if _STAMP in commit)
    newest = next(stamps, None)
    stamp: dict[str, Any] | None = None if newest is None else json.loads(newest)
    return stamp


def _create_sequences(sources: Sources) -> DeltaTable:
    schema = pa.schema(sources.events.schema())
    return create_table(
        sources.lake_uri,
        "sequences",
        sequences_schema(id_type_of(schema, "user_id"), id_type_of(schema, "item_id")),
        sources.options,
        num_buckets=num_buckets_of(sources.events),
    )


def _find_rare_items(
    sources: Sources, buckets: dict[int, list[str]], rules: SequencesConfig
) -> pa.Array | None:
    if rules.min_item_events <= 1:
        return None
    tasks = [{"files": files} for files in buckets.values()]
    counted = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        _count_bucket,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"rules": rules, "options": sources.options},
    )
    return find_rare_items(counted.iter_batches(batch_size=None, batch_format="pyarrow"), rules)


def _count_bucket(
    batch: pa.Table, *, rules: SequencesConfig, options: Mapping[str, str]
) -> pa.Table:
    events = read_files(batch["files"][0].as_py(), ["item_id", "event_type"], options)
    return count_items(events, rules)


def _build(
    sources: Sources,
    buckets: dict[int, list[str]],
    rules: SequencesConfig,
    rare_items: pa.Array | None,
) -> Built:
    users = files_by_bucket(sources.users) if sources.users else {}
    tasks = [
        {"bucket": bucket, "events": files, "users": users.get(bucket, [])}
        for bucket, files in buckets.items()
    ]
    num_tasks = -(-len(tasks) // rules.buckets_per_task)
    written = ray.data.from_items(tasks, override_num_blocks=num_tasks).map_batches(
        _build_bucket,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={
            "lake_uri": sources.lake_uri,
            "rules": rules,
            "rare_items": rare_items,
            "options": sources.options,
        },
    )
    return _gather(written.take_all())


def _build_bucket(
    batch: pa.Table,
    *,
    lake_uri: str,
    rules: SequencesConfig,
    rare_items: pa.Array | None,
    options: Mapping[str, str],
) -> pa.Table:
    """Reads one bucket, builds, writes its file; returns one row that describes what it did."""
    task = batch.to_pylist()[0]
    events = read_files(task["events"], _FILE_COLUMNS, options)
    bucket = np.full(events.num_rows, task["bucket"], np.int32)
    events = events.append_column(PARTITION, pa.array(bucket))
    users = read_files(task["users"], list(USER_COLUMNS), options) if task["users"] else None

    sequences, counts = build_sequences(events, users, rules, rare_items=rare_items)
    part = None
    if sequences.num_rows:
        part = write_part(lake_uri, "sequences", sequences, task["bucket"], options)
    lengths = Counter(sequences["item_ids"].combine_chunks().value_lengths().to_pylist())
    report = {"part": part and asdict(part), "counts": counts, "lengths": lengths}
    return pa.table({"report": [json.dumps(report)]})


def _gather(rows: list[dict[str, Any]]) -> Built:
    built = Built([], Counter(), Counter())
    for row in rows:
        report = json.loads(row["report"])
        if report["part"]:
            built.parts.append(Part(**report["part"]))
        built.counts.update(report["counts"])
        built.lengths.update({int(length): num for length, num in report["lengths"].items()})
    return built


def _figures(built: Built) -> dict[str, Any]:
    sizes, users = np.array(sorted(built.lengths.items())).T
    middle = np.searchsorted(np.cumsum(users), users.sum() / 2)
    ends = {"events_kept", "users_kept"}
    rules = {name: num for name, num in built.counts.items() if num and name not in ends}
    kept = {name: built.counts[name] for name in sorted(ends)}
    return rules | kept | {"median_length": int(sizes[middle]), "longest": int(sizes[-1])}


if __name__ == "__main__":
    main(run, job="build_sequences")
