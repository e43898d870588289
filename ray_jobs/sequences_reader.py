"""From the sequences table to tokens with Ray Data, one task a bucket: a first pass learns the
vocabulary, a second one encodes with it."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from deltalake import DeltaTable

from data_lake.errors import TableError
from data_lake.parquet import read_files
from data_lake.tables import (
    files_by_bucket,
    open_table,
    open_version,
    read_table,
    table_exists,
)
from ray_jobs.config import PipelineConfig
from recsys.attributes import NO_ATTRIBUTES, AttributeEncoder
from recsys.catalogue import Catalogue
from recsys.context import ContextEncoder
from recsys.item_table import ItemFeatures
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.splits import Split, SplitConfig, can_train, split_offsets
from recsys.targets import FIELD, TargetsConfig
from recsys.tokens import TokenStore, list_column

_COLUMNS = ("user_id", "segment", "item_ids", "timestamps")


@dataclass(frozen=True)
class Vocabulary:
    """What sequences are encoded with; part of every run and artifact."""

    catalogue: Catalogue
    context: ContextEncoder
    attributes: AttributeEncoder = NO_ATTRIBUTES

    def make_model(self, config: ModelConfig) -> NextItemModel:
        """An untrained model of this vocabulary."""
        features = ItemFeatures.build(self.catalogue, self.attributes)
        return NextItemModel(config, self.catalogue.num_rows, self.context.sizes, features)


@dataclass(frozen=True)
class Learned:
    """What a first pass over the sequences tells."""

    vocabulary: Vocabulary
    num_trainable: int
    """Users with two training events or more, a later one being a target."""
    num_validated: int
    """Users with a validation event."""
    items_version: int | None = None
    """Of the table that attributes come from, None without one."""
    trained_until_us: int | None = None
    """Time of the last training event, microseconds in UTC; None where there is none."""


def open_sequences(config: PipelineConfig, version: int | None = None) -> DeltaTable:
    """The sequences table, at a version or as it is now.

    Raises: TableError when it is missing or empty, or the version was vacuumed.
    """
    table = _open(config, "sequences", version)
    if not table.file_uris():
        raise TableError(
            "The sequences table is empty; ingest more events or loosen [sequences], then run "
            "ray_jobs.build_sequences."
        )
    return table


def learn_vocabulary(
    sequences: DeltaTable,
    config: PipelineConfig,
    new_since_s: int | None = None,
    items_version: int | None = None,
) -> Learned:
    """The catalogue (items of all sequences, their training counts, their attributes) and the
    values that the context fields take in training.

    With `train.attributes` the items that no sequence holds are in the catalogue too. Raises:
    TableError or CatalogueError when there is no items table then, or it lacks such a column.

    Args:
        new_since_s: only events from then on, in seconds since the epoch, are training targets.
        items_version: of the items table; None: as it is now.
    """
    counted = _buckets(sequences).map_batches(
        _count_bucket,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={
            "split": config.split,
            "targets": config.train.targets,
            "new_since_s": new_since_s,
            "fields": _list_fields(sequences, config),
            "options": config.storage.options,
        },
    )
    counts = pa.concat_tables(counted.iter_batches(batch_size=None, batch_format="pyarrow"))
    counts = counts.group_by(["field", "item_id", "value"]).aggregate(
        [("count", "sum"), ("count", "max")]
    )

    of_items = counts.filter(pc.equal(counts["field"], "item_id"))
    items, attributes = _open_items(config, items_version), config.train.attributes
    catalogue = Catalogue.build(
        of_items["item_id"].combine_chunks(),
        of_items["count_sum"].to_numpy(),
        None if items is None else read_table(items),
        with_unseen=bool(attributes.fields),
    )
    values = {
        name: _as_counts(counts.filter(pc.equal(counts["field"], name)))
        for name in config.train.context.categorical
    }
    users = _as_counts(counts.filter(pc.equal(counts["field"], "users")))
    ends = counts.filter(pc.equal(counts["field"], "trained_until_us"))
    return Learned(
        Vocabulary(
            catalogue,
            ContextEncoder.learn(config.train.context, values),
            AttributeEncoder.learn(attributes, catalogue),
        ),
        num_trainable=users["trainable"],
        num_validated=users["validated"],
        items_version=None if items is None else items.version(),
        trained_until_us=pc.max(ends["count_max"]).as_py(),
    )


def load_tokens(
    sequences: DeltaTable, config: PipelineConfig, vocabulary: Vocabulary
) -> ray.data.Dataset:
    """Encoded sequences, a row a user (`TokenStore.to_arrow`), in the object store."""
    encoded = _buckets(sequences).map_batches(
        _encode_bucket,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"vocabulary": vocabulary, "options": config.storage.options},
    )
    return encoded.materialize()


def collect_tokens(
    dataset: "ray.data.Dataset | ray.data.DataIterator", num_fields: int
) -> TokenStore:
    """All rows of `load_tokens` as one store in this process; `num_fields` is F."""
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return TokenStore.concatenate([TokenStore.from_arrow(table, num_fields) for table in tables])


def _buckets(sequences: DeltaTable) -> ray.data.Dataset:
    # The order of users must not depend on which task ends first.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    buckets = [{"files": files} for _, files in sorted(files_by_bucket(sequences).items())]
    return ray.data.from_items(buckets, override_num_blocks=len(buckets))


def _list_fields(sequences: DeltaTable, config: PipelineConfig) -> list[str]:
    """Context fields that have a value a position. Raises: TableError when the table lacks one."""
    fields = [name for name in config.train.context.categorical if name != "segment"]
    there = pa.schema(sequences.schema()).names
    missing = [name for name in fields if list_column(name) not in there]
    if missing:
        raise TableError(
            f"train.context names {', '.join(missing)}, which no event carries; add it to "
            "ingest.context and map it, or leave it out."
        )
    return fields


def _count_bucket(
    batch: pa.Table,
    *,
    split: SplitConfig,
    targets: TargetsConfig,
    fields: list[str],
    options: dict[str, str],
    new_since_s: int | None = None,
) -> pa.Table:
    columns = (*_COLUMNS, *map(list_column, fields))
    sequences = read_files(batch["files"][0].as_py(), columns, options).combine_chunks()
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


def _encode_bucket(batch: pa.Table, *, vocabulary: Vocabulary, options: dict[str, str]) -> pa.Table:
    fields = [name for name in vocabulary.context.config.categorical if name != "segment"]
    columns = (*_COLUMNS, *map(list_column, fields))
    sequences = read_files(batch["files"][0].as_py(), columns, options)
    return TokenStore.from_sequences(sequences, vocabulary.catalogue, vocabulary.context).to_arrow()


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


def _as_counts(counts: pa.Table) -> dict[str, int]:
    return dict(zip(counts["value"].to_pylist(), counts["count_sum"].to_pylist(), strict=True))


def _open(config: PipelineConfig, name: str, version: int | None) -> DeltaTable:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    if version is None:
        return open_table(lake_uri, name, options)
    return open_version(lake_uri, name, version, options)


def _open_items(config: PipelineConfig, version: int | None) -> DeltaTable | None:
    storage = config.storage
    if not table_exists(storage.lake_uri, "items", storage.options):
        if config.train.attributes.fields:
            raise TableError(
                "train.attributes needs an items table, which the lake does not have; ingest "
                "[[ingest.items]] first, or leave train.attributes out."
            )
        return None
    return _open(config, "items", version)
