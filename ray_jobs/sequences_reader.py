"""From the sequences table to tokens with Ray Data, one task a bucket: a first pass learns the
vocabulary, a second one encodes with it."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from deltalake import DeltaTable

from data_lake.errors import TableError
from data_lake.tables import (
    files_by_bucket,
    open_table,
    open_version,
    read_table,
    table_exists,
)
from ray_jobs.bucket_tasks import add_up_counts, count_bucket, encode_bucket
from ray_jobs.config import PipelineConfig
from ray_jobs.fan_out import one_block_each
from recsys.attributes import NO_ATTRIBUTES, AttributeEncoder
from recsys.catalogue import Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.item_table import ItemFeatures
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.targets import TargetsConfig
from recsys.tokens import TokenStore, list_column


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
    fields = _list_fields(sequences, config.train.context.categorical, "train.context")
    targets = config.train.targets
    of_items, counts = _count(sequences, config, fields, targets=targets, new_since_s=new_since_s)
    items, attributes = _open_items(config, items_version), config.train.attributes
    catalogue = Catalogue.build(
        of_items["item_id"].combine_chunks(),
        of_items["count"].to_numpy(),
        None if items is None else read_table(items),
        with_unseen=bool(attributes.fields),
    )
    values = _values(counts, config.train.context.categorical)
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


def widen_context(
    sequences: DeltaTable, config: PipelineConfig, context: ContextEncoder, names: tuple[str, ...]
) -> ContextEncoder:
    """The encoder with these categorical fields beside its own, as far as training events have
    values of them. Raises: TableError when the table lacks one.
    """
    further = tuple(name for name in names if name not in context.config.categorical)
    if not further:
        return context
    fields = _list_fields(sequences, further, "evaluate.slices")
    _, counts = _count(sequences, config, fields, targets=TargetsConfig())
    values = _values(counts, further)
    known = tuple(name for name in further if values[name])
    categorical = (*context.config.categorical, *known)
    learned = ContextEncoder.learn(ContextConfig(categorical=known, time=()), values)
    return ContextEncoder(
        context.config.model_copy(update={"categorical": categorical}),
        {**context.vocabularies, **learned.vocabularies},
    )


def load_tokens(
    sequences: DeltaTable, config: PipelineConfig, vocabulary: Vocabulary
) -> ray.data.Dataset:
    """Encoded sequences, a row a user (`TokenStore.to_arrow`), in the object store."""
    encoded = _buckets(sequences).map_batches(
        encode_bucket,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={
            "catalogue": vocabulary.catalogue,
            "context": vocabulary.context,
            "options": config.storage.options,
        },
    )
    return encoded.materialize()


def collect_tokens(
    dataset: "ray.data.Dataset | ray.data.DataIterator", num_fields: int
) -> TokenStore:
    """All rows of `load_tokens` as one store in this process; `num_fields` is F."""
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return TokenStore.concatenate([TokenStore.from_arrow(table, num_fields) for table in tables])


def _count(
    sequences: DeltaTable, config: PipelineConfig, fields: list[str], **asked: Any
) -> tuple[pa.Table, pa.Table]:
    """What `count_bucket` finds in all buckets; `asked` are arguments of it."""
    counted = _buckets(sequences).map_batches(
        count_bucket,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={
            "split": config.split,
            "fields": fields,
            "options": config.storage.options,
            **asked,
        },
    )
    return add_up_counts(counted.iter_batches(batch_size=None, batch_format="pyarrow"))


def _buckets(sequences: DeltaTable) -> ray.data.Dataset:
    # The order of users must not depend on which task ends first.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    buckets = [{"files": files} for _, files in sorted(files_by_bucket(sequences).items())]
    return one_block_each(buckets)


def _list_fields(sequences: DeltaTable, names: tuple[str, ...], setting: str) -> list[str]:
    """Context fields that have a value a position. Raises: TableError when the table lacks one."""
    fields = [name for name in names if name != "segment"]
    there = pa.schema(sequences.schema()).names
    missing = [name for name in fields if list_column(name) not in there]
    if missing:
        raise TableError(
            f"{setting} names {', '.join(missing)}, which no event carries; add it to "
            "ingest.context and map it, or leave it out."
        )
    return fields


def _values(counts: pa.Table, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """How often each field takes each value."""
    return {name: _as_counts(counts.filter(pc.equal(counts["field"], name))) for name in names}


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
