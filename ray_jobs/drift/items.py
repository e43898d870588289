"""What is known of each item before drift is counted: learned in a first pass over the events."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.buckets import hash_ids
from data_lake.parquet import read_files
from ray_jobs.drift.axes import Periods, group_of
from recsys.drift import popularity_buckets

NUM_ITEM_GROUPS = 64
MAX_CATEGORIES = 30
"""Categories that have a count of their own."""
OTHER, MISSING = "(other)", "(none)"
_NUM_COVERED = 300
"""Items of the catalogue, chosen by hash, whose coverage stands for that of all."""
_NEVER_US = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ItemFacts:
    """What is known of each item that occurs in events or in the catalogue that serves, `[I]`."""

    item_ids: pa.Array
    popularity_HI: np.ndarray
    """Bucket by the events of each half of the users, `[2, I]`: those of one half are sorted by
    what the other did in both periods. With the reference period alone, whatever was popular in it
    by chance would seem to fall back; both together stay what they are when windows are exchanged.
    """
    categories_I: np.ndarray
    first_us_I: np.ndarray
    """Of the first event of anybody."""
    is_known_I: np.ndarray
    """Whether the version that serves has it."""
    covered_I: np.ndarray
    """Number among the items whose coverage is watched, -1 for the others."""

    @cached_property
    def groups_I(self) -> np.ndarray:
        """A group by hash: that other items are popular shows, which ones needs no list of them."""
        return (hash_ids(self.item_ids) % np.uint64(NUM_ITEM_GROUPS)).astype(np.uint8)

    def find(self, item_ids: pa.Array) -> np.ndarray:
        """Rows of ids, -1 for those that nobody knows."""
        rows: np.ndarray = pc.fill_null(pc.index_in(item_ids, self.item_ids), -1).to_numpy(
            zero_copy_only=False
        )
        return rows


def count_items(files: Sequence[str], periods: Periods, options: Mapping[str, str]) -> pa.Table:
    """Of each item of a bucket `first_us`, the events of either half of the users in both periods,
    `even` and `odd`, and those of all users in the `reference` period.
    """
    rows = read_files(files, ("user_id", "item_id", "timestamp"), options)
    users = rows["user_id"].combine_chunks().dictionary_encode()
    is_odd = (group_of(users.dictionary) % 2 == 1)[users.indices.to_numpy()]
    times_us = microseconds(rows["timestamp"])
    slots = periods.slot_of(times_us)
    is_counted, is_current = slots >= 0, slots == periods.num_slots - 1
    found = pa.table(
        {
            "item_id": rows["item_id"],
            "first_us": times_us,
            "even": (is_counted & ~is_odd).astype(np.int64),
            "odd": (is_counted & is_odd).astype(np.int64),
            "reference": (is_counted & ~is_current).astype(np.int64),
        }
    )
    return add_items([found])


def add_items(tables: Sequence[pa.Table]) -> pa.Table:
    """Several results of `count_items` as one."""
    grouped = pa.concat_tables(tables).group_by("item_id")
    sums = ("even", "odd", "reference")
    added = grouped.aggregate([("first_us", "min"), *((name, "sum") for name in sums)])
    names = {"first_us_min": "first_us"} | {f"{name}_sum": name for name in sums}
    return added.rename_columns(names).combine_chunks()


def learn_items(
    counted: pa.Table, known_ids: pa.Array, categories: pa.Table | None
) -> tuple[ItemFacts, tuple[str, ...]]:
    """Facts of the items that were counted or are known, and the labels of their categories (none
    where no item has one): the most frequent ones, OTHER and MISSING.

    Args:
        counted: `count_items` of all buckets.
        known_ids: the catalogue that serves.
        categories: item_id and category of the items table.
    """
    new = known_ids.filter(pc.invert(pc.is_in(known_ids, counted["item_id"].combine_chunks())))
    item_ids = pa.concat_arrays([counted["item_id"].combine_chunks(), new])
    even, odd, first_us = (
        np.concatenate([counted[name].to_numpy(), np.full(len(new), missing)])
        for name, missing in (("even", 0), ("odd", 0), ("first_us", _NEVER_US))
    )
    codes, labels = _categorise(item_ids, even + odd, categories)
    is_known = np.asarray(pc.is_in(item_ids, known_ids), bool)
    facts = ItemFacts(
        item_ids,
        np.stack([popularity_buckets(even), popularity_buckets(odd)]),
        codes,
        first_us,
        is_known,
        _choose_covered(item_ids, is_known),
    )
    return facts, labels


def value_codes(values: pa.Array, labels: Sequence[str]) -> np.ndarray:
    """Places of texts among labels that end with OTHER and MISSING."""
    known = pc.index_in(values, pa.array(labels[:-2], pa.string()))
    codes = pc.if_else(pc.is_null(values), len(labels) - 1, pc.fill_null(known, len(labels) - 2))
    return np.asarray(codes.to_numpy(zero_copy_only=False), np.int64)


def parse_ids(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    """Ids of the lake's own type from text; null for what is none."""
    if not pa.types.is_integer(kind):
        return texts.cast(pa.string())
    is_number = pc.match_substring_regex(texts, r"^-?[0-9]{1,18}$")
    return pc.if_else(is_number, texts, pa.scalar(None, pa.string())).cast(kind)


def microseconds(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column of timestamps, int64."""
    numbers: np.ndarray = column.combine_chunks().view(pa.int64()).to_numpy()
    return numbers


def _categorise(
    item_ids: pa.Array, counts_I: np.ndarray, categories: pa.Table | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    if categories is None or categories["category"].null_count == len(categories):
        return np.zeros(len(item_ids), np.int64), ()
    row = pc.index_in(item_ids, categories["item_id"].combine_chunks())
    names = categories["category"].combine_chunks().cast(pa.string()).take(row)
    counted = (
        pa.table({"name": names, "num": counts_I}).group_by("name").aggregate([("num", "sum")])
    )
    largest = counted.sort_by([("num_sum", "descending"), ("name", "ascending")])["name"]
    kept = largest.drop_null().slice(0, MAX_CATEGORIES).to_pylist()
    labels = (*kept, OTHER, MISSING)
    return value_codes(names, labels), labels


def _choose_covered(item_ids: pa.Array, is_known_I: np.ndarray) -> np.ndarray:
    hashes = np.where(is_known_I, hash_ids(item_ids), np.iinfo(np.uint64).max)
    chosen = np.argsort(hashes, kind="stable")[: min(_NUM_COVERED, int(is_known_I.sum()))]
    covered_I = np.full(len(item_ids), -1)
    covered_I[chosen] = np.arange(len(chosen))
    return covered_I
