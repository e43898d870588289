"""From whole buckets of events to one row a user: no loop over users, no shuffle.

Everything that repeats (event types, devices, text ids) is handled as codes, from the Parquet file
that it is read from to the one that it is written to.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_lake.cleaning import CleaningConfig, FlatEvents, Mask, clean, user_offsets
from data_lake.ordering import Ints, chronological_order, radix_order
from data_lake.schemas import PARTITION, TIMESTAMP

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
TEXT_COLUMNS = ("event_type", "device")
"""Columns that are best read dictionary-encoded, as are ids that are text and further context."""
USER_COLUMNS = ("user_id", "segment")


class SequencesConfig(CleaningConfig):
    """The cleaning rules."""

    def digest(self) -> str:
        """Changes when, and only when, a setting that changes the sequences does."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def build_sequences(
    events: pa.Table,
    users: pa.Table | None,
    config: CleaningConfig,
    *,
    rare_items: pa.Array | None = None,
    context: tuple[str, ...] = (),
) -> tuple[pa.Table, Counter[str]]:
    """Sequences of all users of whole buckets, ordered by bucket and user, and what was removed.

    `events` has `EVENT_COLUMNS` and the text columns that `context` names, in any row order;
    `users` has `USER_COLUMNS` (None, or a user that is not in it: segment is null). `rare_items`
    comes from `find_rare_items`, for the whole table. The columns are those of `sequences_schema`,
    with text in lists dictionary-encoded; `write_part` stores it as plain text.
    """
    user, user_ids = _rank_codes(events["user_id"])
    item, item_ids = _item_codes(events["item_id"])
    texts = {name: _codes(events[name]) for name in ("event_type", "device", *context)}
    event_type, event_types = texts.pop("event_type")
    timestamp = _numbers(events["timestamp"])
    order = chronological_order(
        user, timestamp, _numbers(events["ingested_at"]), _numbers(events["arrival"])
    )
    bucket = _bucket_of_users(events[PARTITION], user, len(user_ids))
    others = {name: codes for name, (codes, _) in texts.items()}
    flat = FlatEvents(user, item, event_type, timestamp, others).take(order)

    wrong_types = _wrong_types(event_types, config)
    flat, counts = clean(
        flat,
        config,
        wrong_type=wrong_types[flat.event_type] if wrong_types.any() else None,
        rare_item=_mask_rare(flat.item, item_ids, rare_items),
    )

    offsets = user_offsets(flat.user)
    whose = flat.user[offsets[:-1]]
    ids = user_ids.take(pa.array(whose))
    lists = {
        "item_ids": _decode(flat.item, item_ids),
        "event_types": _decode(flat.event_type, event_types),
        "timestamps": pa.array(flat.timestamp_us).view(TIMESTAMP),
        "devices": _decode(flat.context["device"], texts["device"][1]),
    }
    further = {name: _decode(flat.context[name], texts[name][1]) for name in context}
    sequences = pa.table(
        {"user_id": ids, "segment": _segments(ids, users)}
        | {name: _lists(offsets, values) for name, values in lists.items()}
        | {PARTITION: pa.array(bucket[whose])}
        | {name: _lists(offsets, values) for name, values in further.items()}
    )
    return _by_bucket(sequences, bucket[whose]), counts


def count_items(
    events: pa.Table, config: CleaningConfig, rare_items: pa.Array | None = None
) -> pa.Table:
    """Events of the kept types per item, for `min_item_events`: columns `item_id`, `num_events`.

    `events` are whole buckets with the columns user_id, item_id and event_type. With the items that
    are known to be rare, their events do not count, nor do those of users who have fewer than
    `min_user_events` without them.
    """
    user, item = _plain(events["user_id"]), _plain(events["item_id"])
    if config.event_types is not None:
        kept = pa.array(config.event_types, pa.string())
        is_kept = pc.is_in(_plain(events["event_type"]), value_set=kept)
        user, item = user.filter(is_kept), item.filter(is_kept)
    if rare_items is not None:
        is_frequent = pc.invert(pc.is_in(item, value_set=rare_items.cast(item.type)))
        user, item = user.filter(is_frequent), item.filter(is_frequent)
        codes = user.dictionary_encode().indices.to_numpy()
        num_events = np.bincount(codes)
        item = item.filter(pa.array(num_events[codes] >= config.min_user_events))
    counted = item.value_counts()
    return pa.table({"item_id": counted.field("values"), "num_events": counted.field("counts")})


def find_rare_items(
    counts: Iterable[pa.Table], config: CleaningConfig, rare_items: pa.Array | None = None
) -> pa.Array:
    """Items with fewer than `min_item_events`, from the counts of all buckets, and those that were
    `rare_items` before.
    """
    # Added up one by one: together they would be as long as the events.
    total: pa.Table | None = None
    for counted in counts:
        total = counted if total is None else _add_counts(total, counted)
    if total is None:
        return pa.array([], pa.int64()) if rare_items is None else rare_items
    is_rare = pc.less(total["num_events"], config.min_item_events)
    found = _plain(total.filter(is_rare)["item_id"])
    return found if rare_items is None else pa.concat_arrays([rare_items, found])


def _add_counts(left: pa.Table, right: pa.Table) -> pa.Table:
    both = pa.concat_tables([left, right]).group_by("item_id").aggregate([("num_events", "sum")])
    return pa.table({"item_id": both["item_id"], "num_events": both["num_events_sum"]})


def digest_rare(items: pa.ChunkedArray, rare_items: pa.Array) -> str:
    """Changes when, and only when, other items of these are rare."""
    values = _plain(items).unique()
    rare = values.filter(pc.is_in(values, value_set=rare_items.cast(values.type)))
    texts = sorted(rare.cast(pa.string()).to_pylist())
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _by_bucket(sequences: pa.Table, bucket: Ints) -> pa.Table:
    order = radix_order(bucket)
    return sequences if np.all(np.diff(order) > 0) else sequences.take(pa.array(order))


def _bucket_of_users(column: pa.ChunkedArray, user: Ints, num_users: int) -> NDArray[np.int32]:
    bucket = np.empty(num_users, np.int32)
    bounds = pc.min_max(column)
    if bounds["min"] == bounds["max"]:
        bucket[:] = bounds["min"].as_py() or 0
    else:
        bucket[user] = column.to_numpy()
    return bucket


def _wrong_types(event_types: pa.Array, config: CleaningConfig) -> Mask:
    """For each code, whether the type is to be left out."""
    if config.event_types is None:
        return np.zeros(len(event_types), bool)
    kept = pc.is_in(event_types, value_set=pa.array(config.event_types, pa.string()))
    return np.asarray(pc.invert(kept), bool)


def _mask_rare(item: Ints, item_ids: pa.Array | None, rare_items: pa.Array | None) -> Mask | None:
    """Which events are of a rare item."""
    if rare_items is None:
        return None
    if item_ids is None:
        return np.asarray(pc.is_in(pa.array(item), value_set=rare_items.cast(pa.int64())), bool)
    is_rare = pc.is_in(item_ids, value_set=rare_items.cast(item_ids.type))
    return np.asarray(is_rare, bool)[item]


def _segments(user_ids: pa.Array, users: pa.Table | None) -> pa.Array:
    if users is None:
        return pa.nulls(len(user_ids), pa.string())
    row = pc.index_in(user_ids, value_set=_plain(users["user_id"]))
    return _plain(users["segment"]).take(row)


def _lists(offsets: NDArray[np.int64], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _item_codes(column: pa.ChunkedArray) -> tuple[Ints, pa.Array | None]:
    """Integers are codes as they are; text is looked up in the values that come second."""
    if pa.types.is_integer(column.type):
        return _numbers(column), None
    return _codes(column)


def _codes(column: pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """Codes `[rows]` and the distinct values that they point to; null is a value of its own."""
    encoded = column.unify_dictionaries().combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = _plain(column).dictionary_encode()
    codes, values = encoded.indices, _plain(pa.chunked_array([encoded.dictionary]))
    if codes.null_count:
        codes = pc.fill_null(codes, len(values))
        values = pa.concat_arrays([values, pa.nulls(1, values.type)])
    # Most columns have a handful of values: what is gathered is a byte each.
    return codes.to_numpy().astype(np.min_scalar_type(len(values))), values


def _decode(codes: Ints, values: pa.Array | None) -> pa.Array:
    """The values of codes, dictionary-encoded; integers as they are."""
    if values is None:
        return pa.array(codes)
    mask = None
    if values.null_count:
        mask = codes == len(values) - 1
        codes, values = np.where(mask, 0, codes), values[:-1]
    indices = pa.array(codes.astype(np.int32), mask=mask)
    return pa.DictionaryArray.from_arrays(indices, values)


def _rank_codes(column: pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """Like `_codes` for ids, with the values in ascending order, so that codes sort as ids do."""
    if pa.types.is_integer(column.type):
        encoded = column.combine_chunks().dictionary_encode()
        codes, values = encoded.indices.to_numpy(), encoded.dictionary
    else:
        codes, values = _codes(column)
    order = pc.sort_indices(values).to_numpy()
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    return rank[codes], values.take(pa.array(order))


def _plain(column: pa.ChunkedArray) -> pa.Array:
    # Files that Delta itself rewrote (merge, compaction) have strings of a type with few kernels.
    array = column.combine_chunks()
    return array if pa.types.is_integer(array.type) else array.cast(pa.string())


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """The 64-bit integers of a column without nulls; microseconds for a timestamp."""
    array = column.combine_chunks()
    return np.asarray(array.view(pa.int64()) if array.type != pa.int64() else array, np.int64)
