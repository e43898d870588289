"""The two steps of an ingest that run anywhere: cut the rows of a part by bucket, and merge what
came for a bucket with what is there. In between are nothing but tables, for the caller to move.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_lake.buckets import bucket_of
from data_lake.normalise import Normalised, derive_event_ids, normalise
from data_lake.readers import read_part
from data_lake.schemas import PARTITION, TIMESTAMP, quarantine_schema
from data_lake.sources import Part, SourceConfig, cut_file, digest_file
from data_lake.storage import Options
from data_lake.tables import Part as WrittenPart
from data_lake.tables import read_files, write_part

_ROWS_OF_A_PART = 2**32


@dataclass(frozen=True)
class SourceFile:
    """A file that was found, and the parts that it is read in."""

    source: SourceConfig
    path: str
    digest: str
    parts: list[Part]

    def transaction(self, kind: str) -> tuple[str, int]:
        """Under which the log of a table remembers the file."""
        return f"{kind}:{self.digest}", 1


@dataclass(frozen=True)
class PartTask:
    """One part of one source, and its place among all parts of the run."""

    source: SourceConfig
    part: Part
    index: int
    is_quarantined: bool = False
    """An earlier run has committed the bad rows of this file, and was cut short then."""


@dataclass(frozen=True)
class Target:
    """Where a run writes, and when it began."""

    lake_uri: str
    options: Mapping[str, str]
    schema: pa.Schema
    num_buckets: int
    started_us: int
    """Microseconds since 1970."""


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


def look_at(source: SourceConfig, path: str, options: Options | None = None) -> SourceFile:
    """Digest and parts of one file, its columns checked. Raises: SourceError."""
    return SourceFile(source, path, digest_file(path, options), cut_file(source, path, options))


def load_part(task: PartTask, target: Target) -> tuple[PartReport, pa.Table]:
    """Reads and checks a part and writes its bad rows to quarantine, uncommitted.

    Returns the good rows with those columns that the source gives.
    """
    raw = read_part(task.source, task.part, target.options)
    checked = normalise(raw, task.source, target.schema, now_us=target.started_us)
    quarantine = _write_rejected(checked, task, target)
    return PartReport(raw.num_read, checked.rejected.num_rows, quarantine), checked.rows


def load_events(
    task: PartTask, target: Target, num_groups: int
) -> tuple[PartReport | pa.Table, ...]:
    """Loads, completes and cuts a part: its report, then its events of each group of buckets."""
    report, rows = load_part(task, target)
    events = complete_events(rows, task, target)
    return report, *cut_groups(events, group_edges(target.num_buckets, num_groups))


def complete_events(rows: pa.Table, task: PartTask, target: Target) -> pa.Table:
    """All columns of the events table, ordered by bucket and arrival: what the source does not say
    (ids, arrival, bucket) is added.
    """
    if "event_id" not in rows.column_names:
        rows = rows.append_column("event_id", derive_event_ids(rows))
    arrival = task.index * _ROWS_OF_A_PART + np.arange(rows.num_rows)
    buckets = bucket_of(rows["user_id"], target.num_buckets)
    added = {
        "ingested_at": _constant_time(target.started_us, rows.num_rows),
        "arrival": pa.array(arrival, pa.int64()),
        PARTITION: pa.array(buckets),
    }
    given = set(rows.column_names)
    for field in target.schema:
        if field.name not in given:
            values = added.get(field.name)
            values = pa.nulls(rows.num_rows, field.type) if values is None else values
            rows = rows.append_column(field, values)
    # A stable sort of 16-bit numbers is a radix sort.
    order = np.argsort(buckets.astype(np.int16), kind="stable")
    return rows.select(target.schema.names).cast(target.schema).take(pa.array(order))


def group_edges(num_buckets: int, num_groups: int) -> NDArray[np.int64]:
    """Group `g` holds the buckets from `edges[g]` to below `edges[g + 1]`."""
    return np.arange(num_groups + 1) * num_buckets // num_groups


def cut_groups(events: pa.Table, edges: NDArray[np.int64]) -> list[pa.Table]:
    """Events that are ordered by bucket as one table a group."""
    bounds = np.searchsorted(events[PARTITION].to_numpy(), edges)
    return [events.slice(start, stop - start) for start, stop in pairwise(bounds)]


def merge_group(
    existing: Mapping[int, Sequence[str]], target: Target, *pieces: pa.Table
) -> MergeReport:
    """Writes the new events of a group of buckets, a part a bucket, uncommitted.

    The pieces come in order of arrival, each ordered by bucket. An event whose id came before, in
    this run or in the committed files `existing` of its bucket, is a duplicate; of equal ones the
    first to arrive is kept.
    """
    parts, num_duplicates = [], 0
    for bucket, events in _by_bucket(pieces):
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
    # Codes are numbered as they first appear: an event is new when its code exceeds all before it.
    is_first = np.diff(np.maximum.accumulate(codes), prepend=-1) > 0
    return events if is_first.all() else events.filter(pa.array(is_first))


def _write_rejected(checked: Normalised, task: PartTask, target: Target) -> WrittenPart | None:
    rejected = checked.rejected
    if rejected.num_rows == 0 or task.is_quarantined:
        return None
    source = pa.repeat(task.part.path, rejected.num_rows)
    ingested_at = _constant_time(target.started_us, rejected.num_rows)
    columns = [rejected["raw"], rejected["reason"], source, ingested_at]
    rows = pa.table(columns, schema=quarantine_schema())
    return write_part(target.lake_uri, "quarantine", rows, options=target.options)


def _by_bucket(pieces: Sequence[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    columns = [piece[PARTITION].to_numpy() for piece in pieces]
    for bucket in np.unique(np.concatenate(columns)):
        slices = []
        for piece, buckets in zip(pieces, columns, strict=True):
            start, stop = np.searchsorted(buckets, [bucket, bucket + 1])
            slices.append(piece.slice(start, stop - start))
        yield int(bucket), pa.concat_tables(slices).combine_chunks()


def _known_ids(files: Sequence[str], options: Mapping[str, str]) -> pa.Array | None:
    if not files:
        return None
    return read_files(files, ["event_id"], options)["event_id"].combine_chunks()


def _constant_time(time_us: int, num_rows: int) -> pa.Array:
    return pa.array(np.full(num_rows, time_us), pa.int64()).cast(TIMESTAMP)
