"""What each task of `ray_jobs.sequences_reader` does with its bucket of the sequences table.

Nothing here imports torch: a worker of Ray Data that has just been started begins seconds earlier.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_lake.parquet import read_files
from recsys.catalogue import Catalogue
from recsys.context import ContextEncoder
from recsys.splits import Split, SplitConfig, can_train, split_offsets
from recsys.targets import FIELD, TargetsConfig
from recsys.tokens import TokenStore, list_column

_COLUMNS = ("user_id", "segment", "item_ids", "timestamps")
_BUCKETS_AT_ONCE = 16


def count_bucket(
    batch: pa.Table,
    *,
    split: SplitConfig,
    targets: TargetsConfig,
    fields: list[str],
    options: dict[str, str],
    new_since_s: int | None = None,
) -> pa.Table:
    """Counts of one bucket: events of each item and of each value of the fields in training, users
    that can be trained and validated on, and the time of the last training event.

    Args:
        fields: context fields that have a value a position.
        new_since_s: only events from then on, in seconds since the epoch, are training targets.

    Returns:
        Columns field, item_id, value and count; the field says which of the others are filled.
    """
    sequences = _read(batch, fields, options)
    is_target_T = (
        targets.mark(_flatten(sequences, list_column(FIELD))) if targets.event_types else None
    )
    timestamps_T = _flatten(sequences, "timestamps").cast(pa.int64()).to_numpy()
    offsets_U = _offsets(sequences)
    cut = split_offsets(offsets_U, timestamps_T, split, is_target_T)
    places_T = np.arange(offsets_U[-1])
    is_training = pa.array(places_T < np.repeat(cut.train_end_U, np.diff(offsets_U)))
    if new_since_s is not None:
        is_new_T = timestamps_T >= new_since_s * 1_000_000
        is_target_T = is_new_T if is_target_T is None else is_new_T & is_target_T
    items = _flatten(sequences, "item_ids")
    # Items that were only seen later are in the catalogue too, with a count of 0.
    parts = [
        _users(cut, can_train(offsets_U, cut, is_target_T)),
        _last_moment(timestamps_T, is_training),
        _count("item_id", pc.if_else(is_training, 1, 0), item_id=items),
        _count("segment", pa.array(np.ones(len(sequences), np.int64)), value=_segments(sequences)),
    ]
    for field in fields:
        values = _flatten(sequences, list_column(field)).filter(is_training)
        parts.append(_count(field, pa.array(np.ones(len(values), np.int64)), value=values))
    id_type = sequences.schema.field("item_ids").type.value_type
    schema = pa.schema(
        [
            ("field", pa.string()),
            ("item_id", id_type),
            ("value", pa.string()),
            ("count", pa.int64()),
        ]
    )
    return pa.concat_tables([_with_schema(part, schema) for part in parts])


def add_up_counts(counted: Iterable[pa.Table]) -> tuple[pa.Table, pa.Table]:
    """Counts of all buckets, of which a few are held at a time.

    Returns:
        Columns item_id and count; and columns field, value, count_sum and count_max of all else.
    """
    of_items: list[pa.Table] = []
    of_others: list[pa.Table] = []
    for table in counted:
        is_of_item = pc.equal(table["field"], "item_id")
        of_items.append(table.filter(is_of_item).select(["item_id", "count"]))
        of_others.append(table.filter(pc.invert(is_of_item)))
        if len(of_items) == _BUCKETS_AT_ONCE:
            of_items = [_add_up_items(of_items)]
    others = pa.concat_tables(of_others).group_by(["field", "value"])
    return _add_up_items(of_items), others.aggregate([("count", "sum"), ("count", "max")])


def encode_bucket(
    batch: pa.Table, *, catalogue: Catalogue, context: ContextEncoder, options: dict[str, str]
) -> pa.Table:
    """Sequences of one bucket, encoded: `TokenStore.to_arrow`."""
    fields = [name for name in context.config.categorical if name != "segment"]
    sequences = _read(batch, fields, options)
    return TokenStore.from_sequences(sequences, catalogue, context).to_arrow()


def _add_up_items(tables: list[pa.Table]) -> pa.Table:
    sums = pa.concat_tables(tables).group_by("item_id").aggregate([("count", "sum")])
    return sums.rename_columns(["item_id", "count"])


def _read(batch: pa.Table, fields: list[str], options: dict[str, str]) -> pa.Table:
    """The rows of a bucket in one chunk, with codes in place of text."""
    lists = [list_column(name) for name in fields]
    files, columns = batch["files"][0].as_py(), (*_COLUMNS, *lists)
    return read_files(files, columns, options, dictionary=("segment", *lists)).combine_chunks()


def _offsets(sequences: pa.Table) -> np.ndarray:
    lengths_U = sequences["item_ids"].chunk(0).value_lengths().to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths_U)]).astype(np.int64)


def _users(cut: Split, is_trainable_U: np.ndarray) -> pa.Table:
    numbers = [int(is_trainable_U.sum()), int((cut.validation_U >= 0).sum())]
    counts = {"value": ["trainable", "validated"], "count": numbers}
    return pa.table({"field": ["users", "users"], **counts})


def _last_moment(timestamps_T: np.ndarray, is_training: pa.Array) -> pa.Table:
    last_us = pc.max(pa.array(timestamps_T).filter(is_training))
    return pa.table({"field": ["trained_until_us"], "count": [last_us.as_py()]})


def _count(field: str, ones: pa.Array, **columns: pa.Array) -> pa.Table:
    ((name, values),) = columns.items()
    table = pa.table({name: values, "count": ones}).filter(pc.is_valid(values))
    counts = table.group_by(name).aggregate([("count", "sum")]).rename_columns([name, "count"])
    return counts.append_column("field", pa.array([field] * len(counts), pa.string()))


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, names=schema.names).cast(schema)


def _flatten(sequences: pa.Table, column: str) -> pa.Array:
    return sequences[column].chunk(0).flatten()


def _segments(sequences: pa.Table) -> pa.Array:
    return sequences["segment"].chunk(0)
