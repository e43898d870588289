"""The two steps of an ingest that run anywhere: cut normalised events by bucket, and merge what
came for a bucket with what is there."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.buckets import bucket_of
from data_lake.normalise import derive_event_ids, normalise
from data_lake.schemas import PARTITION, TIMESTAMP, quarantine_schema
from data_lake.sources import Part, SourceConfig, read_part
from data_lake.tables import Part as WrittenPart
from data_lake.tables import read_files, write_part

_ROWS_OF_A_PART = 2**32


@dataclass(frozen=True)
class PartTask:
    """One part of one source, and its place among all parts of the run."""

    source: SourceConfig
    part: Part
    index: int


@dataclass(frozen=True)
class Target:
    """Where a run writes, and when it began."""

    lake_uri: str
    options: Mapping[str, str]
    schema: pa.Schema
    num_buckets: int
    started_us: int


@dataclass(frozen=True)
class PartReport:
    """How many rows a part had, and where its bad ones were written."""

    num_read: int
    num_rejected: int
    quarantine: WrittenPart | None


@dataclass(frozen=True)
class MergeReport:
    """What was written of a group of buckets."""

    parts: list[WrittenPart]
    num_duplicates: int


def now_us() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1_000


def load_part(task: PartTask, target: Target, num_groups: int) -> tuple[PartReport, list[pa.Table]]:
    """Reads and checks a part, writes its bad rows to quarantine, and cuts the good ones.

    Group `g` of the result holds the events of the buckets `b` with `b % num_groups == g`.
    """
    raw = read_part(task.source, task.part)
    checked = normalise(raw, task.source, target.schema, now_us=target.started_us)
    num_read = raw.columns.num_rows + len(raw.misfits)
    quarantine = write_rejected(checked.rejected, task, target)

    events = complete_events(checked.rows, task, target)
    groups = events[PARTITION].to_numpy() % num_groups
    order = np.argsort(groups, kind="stable")
    bounds = np.searchsorted(groups[order], np.arange(num_groups + 1))
    ordered = events.take(pa.array(order))
    cuts = [ordered.slice(start, stop - start) for start, stop in pairwise(bounds)]
    return PartReport(num_read, checked.rejected.num_rows, quarantine), cuts


def write_rejected(rejected: pa.Table, task: PartTask, target: Target) -> WrittenPart | None:
    """Writes rejected rows as an uncommitted part of `quarantine`; None when there is none."""
    if rejected.num_rows == 0:
        return None
    rows = rejected.append_column(
        "source", pa.array([task.part.path] * rejected.num_rows, pa.string())
    ).append_column("ingested_at", _constant_time(target.started_us, rejected.num_rows))
    return write_part(
        target.lake_uri, "quarantine", rows.cast(quarantine_schema()), options=target.options
    )


def complete_events(rows: pa.Table, task: PartTask, target: Target) -> pa.Table:
    """Adds what the source does not say: ids, order of arrival, bucket, and nulls."""
    if "event_id" not in rows.column_names:
        rows = rows.append_column("event_id", derive_event_ids(rows))
    arrival = task.index * _ROWS_OF_A_PART + np.arange(rows.num_rows)
    added = {
        "ingested_at": _constant_time(target.started_us, rows.num_rows),
        "arrival": pa.array(arrival, pa.int64()),
        PARTITION: pa.array(bucket_of(rows["user_id"], target.num_buckets)),
    }
    columns = [
        added.get(field.name)
        or (
            rows[field.name] if field.name in rows.column_names else pa.nulls(len(rows), field.type)
        )
        for field in target.schema
    ]
    return pa.table(columns, schema=target.schema)


def merge_group(
    pieces: Sequence[pa.Table], existing: Mapping[int, Sequence[str]], target: Target
) -> MergeReport:
    """Writes the new events of a group of buckets, a part a bucket.

    An event whose id came before, in this run or in the committed files `existing` of its bucket,
    is a duplicate; of equal ones the first to arrive is kept.
    """
    parts, num_duplicates = [], 0
    for bucket, events in _by_bucket(pa.concat_tables(pieces)):
        known = _known_ids(existing.get(bucket, ()), target.options)
        fresh = drop_duplicates(events, known)
        num_duplicates += events.num_rows - fresh.num_rows
        if fresh.num_rows:
            parts.append(write_part(target.lake_uri, "events", fresh, bucket, target.options))
    return MergeReport(parts, num_duplicates)


def drop_duplicates(events: pa.Table, known: pa.Array | None = None) -> pa.Table:
    """The first event of each id, in order, without those whose id is `known`."""
    if known is not None and len(known):
        events = events.filter(pc.invert(pc.is_in(events["event_id"], known)))
    ids = events["event_id"].combine_chunks()
    codes = pc.dictionary_encode(ids).indices.to_numpy(zero_copy_only=False)
    # Codes are numbered as they first appear: an event is new when it exceeds all before it.
    highest = np.maximum.accumulate(np.concatenate([[-1], codes]))[:-1] if len(codes) else codes
    is_first = codes > highest
    return events if is_first.all() else events.filter(pa.array(is_first))


def _by_bucket(events: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    buckets = events[PARTITION].to_numpy()
    order = np.lexsort((events["arrival"].to_numpy(), buckets))
    ordered = events.take(pa.array(order))
    present, starts = np.unique(buckets[order], return_index=True)
    for bucket, start, stop in zip(present, starts, [*starts[1:], len(order)], strict=True):
        yield int(bucket), ordered.slice(start, stop - start).combine_chunks()


def _known_ids(files: Sequence[str], options: Mapping[str, str]) -> pa.Array | None:
    if not files:
        return None
    return read_files(files, ["event_id"], options)["event_id"].combine_chunks()


def _constant_time(time_us: int, num_rows: int) -> pa.Array:
    return pa.array(np.full(num_rows, time_us), pa.int64()).cast(TIMESTAMP)
