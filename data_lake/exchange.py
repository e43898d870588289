"""The second step of an ingest, which runs anywhere too: events are packed for their way to the
task of their bucket, and merged there with what is there.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_lake.ingest import Target, constant_time
from data_lake.ordering import chronological_order
from data_lake.parquet import read_files
from data_lake.schemas import PARTITION
from data_lake.tables import Part, table_uri
from data_lake.written import Written, write_rows

_BUCKETS = b"buckets"
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="lz4")

Files = Mapping[int, Sequence[str]]
"""URIs of the committed files of each bucket that has any."""


@dataclass(frozen=True)
class MergeReport:
    """What was written of some buckets."""

    parts: list[Part]
    num_duplicates: int


def group_edges(num_buckets: int, num_groups: int) -> NDArray[np.int64]:
    """Group `g` holds the buckets from `edges[g]` to below `edges[g + 1]`."""
    return np.arange(num_groups + 1) * num_buckets // num_groups


def cut_groups(events: pa.Table, edges: NDArray[np.int64]) -> list[pa.Table]:
    """Events that are ordered by bucket as one table a group."""
    bounds = np.searchsorted(events[PARTITION].to_numpy(), edges)
    return [events.slice(start, stop - start) for start, stop in pairwise(bounds)]


def pack(events: pa.Table) -> pa.Buffer:
    """Events that are ordered by bucket as a compressed Arrow file, a batch a bucket.

    Text that repeats is a dictionary; event ids do not.
    """
    buckets, starts = np.unique(events[PARTITION].to_numpy(), return_index=True)
    columns = {
        name: _packed(events[name].combine_chunks(), name)
        for name in events.column_names
        if name != PARTITION
    }
    rows = pa.record_batch(columns)
    schema = rows.schema.with_metadata({_BUCKETS: json.dumps(buckets.tolist())})
    written = pa.BufferOutputStream()
    with pa.ipc.new_file(written, schema, options=_COMPRESSED) as file:
        for start, stop in pairwise([*starts, events.num_rows]):
            file.write_batch(rows.slice(start, stop - start))
    return written.getvalue()


def unpack(pieces: Sequence[pa.Buffer]) -> Iterator[tuple[int, pa.Table]]:
    """Each bucket that the pieces hold, and its events in the order of the pieces."""
    places = defaultdict(list)
    for piece in pieces:
        file = pa.ipc.open_file(piece)
        for position, bucket in enumerate(json.loads(file.schema.metadata[_BUCKETS])):
            places[bucket].append((file, position))
    for bucket in sorted(places):
        batches = [file.get_batch(position) for file, position in places[bucket]]
        yield bucket, _join([pa.Table.from_batches([batch]) for batch in batches])


def merge_pieces(existing: Files, target: Target, *pieces: pa.Buffer) -> MergeReport:
    """Writes the new events of a group of buckets, a part a bucket, uncommitted.

    The pieces come in order of arrival. An event whose id came before, in this run or in the
    committed files `existing` of its bucket, is a duplicate; of equal ones the first to arrive is
    kept. If it fails, nothing stays written.
    """
    return _merge(unpack(pieces), existing, target)


def merge_events(existing: Files, target: Target, events: pa.Table) -> MergeReport:
    """The same for events of some buckets in any order."""
    order = np.lexsort((events["arrival"].to_numpy(), events[PARTITION].to_numpy()))
    return _merge(_by_bucket(events.take(pa.array(order))), existing, target)


def drop_known(part: Part, files: Sequence[str], target: Target) -> MergeReport:
    """A written part without the events of these committed files of its bucket.

    It is the part itself when none of them is there, else a new one, or none; the old one stays.
    """
    uri = f"{table_uri(target.lake_uri, 'events')}/{part.path}"
    known = _read_ids(files, target)
    ids = _read_ids([uri], target)
    is_new = pc.invert(pc.is_in(ids, known))
    num_duplicates = pc.sum(pc.invert(is_new)).as_py() or 0
    if num_duplicates == 0:
        return MergeReport([part], 0)
    rows = read_files([uri], options=target.options).filter(is_new)
    return MergeReport(_write(rows, part.bucket, target), num_duplicates)


def first_of_each(ids: pa.Array, known: pa.Array) -> NDArray[np.int64]:
    """Row of the first event of each id, in order, without those whose id is `known`."""
    codes = pc.dictionary_encode(ids).indices.to_numpy(zero_copy_only=False)
    # Codes are numbered as they first appear: an event is new when its code exceeds all before it.
    is_first = np.diff(np.maximum.accumulate(codes), prepend=-1) > 0
    if len(known):
        is_first &= ~pc.is_in(ids, known).to_numpy(zero_copy_only=False)
    return np.flatnonzero(is_first)


def reading_order(events: pa.Table) -> NDArray[np.int64]:
    """Row order by user and time of events that stand in order of arrival, which breaks ties.

    So stored, the rows of a user lie together: columns compress better, and sequences need hardly
    any sorting.
    """
    users = _ranks(events["user_id"].combine_chunks())
    times = events["timestamp"].combine_chunks().cast(pa.int64()).to_numpy()
    return chronological_order(users, times, np.zeros(len(users), np.int8), np.arange(len(users)))


def _merge(buckets: Iterable[tuple[int, pa.Table]], existing: Files, target: Target) -> MergeReport:
    parts: list[Part] = []
    num_duplicates = 0
    with Written(target.lake_uri, target.options) as written:
        for bucket, events in buckets:
            known = _read_ids(existing.get(bucket, ()), target)
            fresh = first_of_each(events["event_id"].combine_chunks(), known)
            num_duplicates += events.num_rows - len(fresh)
            if len(fresh) < events.num_rows:
                events = events.take(pa.array(fresh))
            events = events.take(pa.array(reading_order(events)))
            parts += _write(all_columns(events, target), bucket, target)
            written.add("events", *parts)
    return MergeReport(parts, num_duplicates)


def _write(rows: pa.Table, bucket: int | None, target: Target) -> list[Part]:
    if rows.num_rows == 0:
        return []
    return [write_rows(target.lake_uri, "events", rows, bucket, target.options)]


def _packed(values: pa.Array, name: str) -> pa.Array:
    if name == "event_id" or not pa.types.is_string(values.type):
        return values
    return values.dictionary_encode()


def _join(tables: Sequence[pa.Table]) -> pa.Table:
    # Sources may differ in their columns; what one has not is null.
    joined = pa.concat_tables(tables, promote_options="default")
    return joined.unify_dictionaries().combine_chunks()


def _by_bucket(events: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    buckets, starts = np.unique(events[PARTITION].to_numpy(), return_index=True)
    for bucket, (start, stop) in zip(buckets, pairwise([*starts, events.num_rows]), strict=True):
        yield int(bucket), events.slice(start, stop - start)


def all_columns(events: pa.Table, target: Target) -> pa.Table:
    """The columns of the table, but for the bucket, which stands in the path of a file."""
    added = {"ingested_at": constant_time(target.started_us, events.num_rows)}
    fields = [field for field in target.schema if field.name != PARTITION]
    columns = [
        events[field.name].cast(field.type)
        if field.name in events.column_names
        else added.get(field.name, pa.nulls(events.num_rows, field.type))
        for field in fields
    ]
    return pa.table(columns, schema=pa.schema(fields))


def _read_ids(files: Sequence[str], target: Target) -> pa.Array:
    if not files:
        return pa.array([], pa.string())
    return read_files(files, ["event_id"], target.options)["event_id"].combine_chunks()


def _ranks(ids: pa.Array) -> NDArray[np.int64]:
    """Numbers from 0 that are ordered as the ids are."""
    encoded = ids if pa.types.is_dictionary(ids.type) else ids.dictionary_encode()
    ranks = np.empty(len(encoded.dictionary), np.int64)
    ranks[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(ranks))
    codes: NDArray[np.int32] = encoded.indices.to_numpy()
    return ranks[codes]
