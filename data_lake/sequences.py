"""From whole buckets of events to one row a user: no loop over users, no shuffle."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from data_lake.cleaning import CleaningConfig, FlatEvents, clean, user_offsets
from data_lake.schemas import PARTITION, TIMESTAMP, id_type_of, sequences_schema

EVENT_COLUMNS = (
    "user_id",
    "item_id",
    "event_type",
    "timestamp",
    "device",
    "ingested_at",
    "arrival",
    PARTITION,
)
USER_COLUMNS = ("user_id", "segment")


class SequencesConfig(CleaningConfig):
    """The cleaning rules, and how the work is cut into tasks."""

    buckets_per_task: int = Field(default=1, ge=1)
    """Whole buckets that one task reads at once; memory is bounded by their size."""

    def digest(self) -> str:
        """Changes when, and only when, a setting that changes the sequences does."""
        rules = self.model_dump_json(exclude={"buckets_per_task"})
        return hashlib.sha256(rules.encode()).hexdigest()[:16]


def build_sequences(
    events: pa.Table,
    users: pa.Table | None,
    config: CleaningConfig,
    *,
    rare_items: pa.Array | None = None,
) -> tuple[pa.Table, Counter[str]]:
    """Sequences of all users of whole buckets, ordered by bucket and user, and what was removed.

    `events` has `EVENT_COLUMNS`, in any row order; `users` has `USER_COLUMNS` (None, or a user that
    is not in it: segment is null). `rare_items` comes from `find_rare_items`, for the whole table.
    """
    schema = sequences_schema(
        id_type_of(events.schema, "user_id"), id_type_of(events.schema, "item_id")
    )
    user, user_ids = _rank_codes(events["user_id"])
    item, item_ids = _codes(events["item_id"])
    event_type, event_types = _codes(events["event_type"])
    device, devices = _codes(events["device"])
    timestamp = _numbers(events["timestamp"])
    order = _chronological(events, user, timestamp)
    flat = FlatEvents(user, item, event_type, timestamp, device).take(order)

    flat, counts = clean(
        flat,
        config,
        wrong_type=_mask_types(event_types, config)[flat.event_type],
        rare_item=_mask_items(item_ids, rare_items)[flat.item],
    )

    offsets = user_offsets(flat)
    whose = flat.user[offsets[:-1]]
    bucket = np.empty(len(user_ids), np.int32)
    bucket[user] = _numbers(events[PARTITION])
    columns = [
        user_ids.take(pa.array(whose)),
        _segments(user_ids.take(pa.array(whose)), users),
        _lists(offsets, item_ids.take(pa.array(flat.item))),
        _lists(offsets, event_types.take(pa.array(flat.event_type))),
        _lists(offsets, pa.array(flat.timestamp_us).cast(TIMESTAMP)),
        _lists(offsets, devices.take(pa.array(flat.device))),
        pa.array(bucket[whose]),
    ]
    sequences = pa.Table.from_arrays(columns, schema=schema)
    by_bucket = np.argsort(bucket[whose], kind="stable")
    return sequences.take(pa.array(by_bucket)), counts


def count_items(events: pa.Table, config: CleaningConfig) -> pa.Table:
    """Events of the kept types per item, for `min_item_events`: columns `item_id`, `num_events`."""
    if config.event_types is not None:
        kept = pa.array(config.event_types, pa.string())
        events = events.filter(pc.is_in(events["event_type"], value_set=kept))
    counted = events["item_id"].combine_chunks().value_counts()
    return pa.table({"item_id": counted.field("values"), "num_events": counted.field("counts")})


def find_rare_items(counts: Iterable[pa.Table], config: CleaningConfig) -> pa.Array:
    """Items with fewer than `min_item_events`, from the counts of all buckets."""
    # Added up one by one: together they would be as long as the events.
    total: pa.Table | None = None
    for counted in counts:
        total = counted if total is None else _add_counts(total, counted)
    if total is None:
        return pa.array([], pa.int64())
    is_rare = pc.less(total["num_events"], config.min_item_events)
    return total.filter(is_rare)["item_id"].combine_chunks()


def _add_counts(left: pa.Table, right: pa.Table) -> pa.Table:
    both = pa.concat_tables([left, right]).group_by("item_id").aggregate([("num_events", "sum")])
    return pa.table({"item_id": both["item_id"], "num_events": both["num_events_sum"]})


def _chronological(
    events: pa.Table, user: NDArray[np.int64], timestamp: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Row order by user, timestamp, ingested_at, arrival."""
    ingested, arrival = _numbers(events["ingested_at"]), _numbers(events["arrival"])
    # Files mostly come in order of arrival; then the stable sort keeps it and two keys are enough.
    step = np.diff(ingested)
    if np.all((step > 0) | ((step == 0) & (np.diff(arrival) >= 0))):
        return np.lexsort((timestamp, user))
    return np.lexsort((arrival, ingested, timestamp, user))


def _mask_types(event_types: pa.Array, config: CleaningConfig) -> NDArray[np.bool_]:
    """For each code, whether the type is to be left out."""
    if config.event_types is None:
        return np.zeros(len(event_types), bool)
    kept = pc.is_in(event_types, value_set=pa.array(config.event_types, pa.string()))
    return np.asarray(pc.invert(kept), bool)


def _mask_items(item_ids: pa.Array, rare_items: pa.Array | None) -> NDArray[np.bool_]:
    """For each code, whether the item is to be left out."""
    if rare_items is None:
        return np.zeros(len(item_ids), bool)
    rare = pc.is_in(item_ids, value_set=rare_items.cast(item_ids.type))
    return np.asarray(rare, bool)


def _segments(user_ids: pa.Array, users: pa.Table | None) -> pa.Array:
    if users is None:
        return pa.nulls(len(user_ids), pa.string())
    row = pc.index_in(user_ids, value_set=_plain(users["user_id"]))
    return _plain(users["segment"]).take(row)


def _lists(offsets: NDArray[np.int64], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], pa.Array]:
    """Codes `[rows]` and the distinct values that they point to; null is a value of its own."""
    encoded = _plain(column).dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy(), encoded.dictionary


def _rank_codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """Like `_codes`, with the values in ascending order, so that codes sort as values do."""
    codes, values = _codes(column)
    order = pc.sort_indices(values).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[codes], values.take(pa.array(order))


def _plain(column: pa.ChunkedArray) -> pa.Array:
    # Files that Delta itself rewrote (merge, compaction) have strings of a type with few kernels.
    array = column.combine_chunks()
    return array if pa.types.is_integer(array.type) else array.cast(pa.string())


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """The 64-bit integers of a column without nulls; microseconds for a timestamp."""
    return np.asarray(column.combine_chunks().cast(pa.int64()), np.int64)
