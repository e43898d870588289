"""Makes a list for every user with a published version, and puts them into the lake.

    python -m ray_jobs.recommend --config synthetic --set recommend.top_k=20

Lists are those that the endpoint would give at the same moment to the same histories and segments
(see `recommend.variant` for int8).
Models work in actors of Ray Data, a bucket of users at a time. The table `recommendations` gets all
lists in one commit: its readers see the lists of one run, and those of the last one while another
is under way or was killed.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from deltalake import DeltaTable

from data_lake.schemas import (
    PARTITION,
    TIMESTAMP,
    IdType,
    id_type_of,
    recommendations_schema,
)
from data_lake.tables import Part, commit_parts, create_table, files_by_bucket, num_buckets_of
from data_lake.written import Written, write_rows
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main, timed
from ray_jobs.sequences_reader import open_sequences
from ray_jobs.users_reader import Bucket, look_at_buckets, read_users
from recsys.artifact import Artifact, load_artifact
from recsys.encoders import Variant
from recsys.list_maker import ListMaker
from recsys.queries import Event, Query, RequestContext
from recsys.registry import serving_version
from recsys.requests import read_requests
from recsys.retrieval import Best

TABLE = "recommendations"
_STAMP = "nextitem.recommendations"
_NO_LIST = Best(np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True)
class Order:
    """What every actor is told."""

    artifact: Path
    lake_uri: str
    options: dict[str, str]
    schema: pa.Schema
    """Of the table, without its bucket."""
    created_us: int
    """The moment of all requests, microseconds in UTC."""
    top_k: int
    filter_seen: bool
    batch_size: int
    history_events: int
    """Last events of a user that are looked at."""
    num_threads: int
    device: str
    variant: Variant = "fp32"


def run(config: PipelineConfig) -> Report:
    """Makes all lists and commits once.

    Raises: JobError, ArtifactError, TableError; ConflictError when another run committed meanwhile.
    """
    started = time.perf_counter()
    artifact = _open_artifact(config)
    sequences = open_sequences(config)
    schema = _find_schema(artifact, sequences)
    order = _write_order(config, artifact, schema)
    recommendations = create_table(
        order.lake_uri, TABLE, schema, order.options, num_buckets=num_buckets_of(sequences)
    )
    counts, cpu_s = Counter[str](), 0.0
    with Written(order.lake_uri, order.options) as written:
        parts = []
        with timed("make lists"):
            for made in _make_all(config, order, look_at_buckets(config, sequences)):
                parts.append(Part(**made["part"]))
                written.add(TABLE, parts[-1])
                counts.update(made["counts"])
                cpu_s += made["cpu_s"]
        stamp = {
            "model_version": artifact.version,
            "sequences_version": sequences.version(),
            "top_k": order.top_k,
            "variant": order.variant,
        }
        version = _replace(recommendations, parts, stamp)
    seconds = time.perf_counter() - started
    figures = {
        "users": counts.total(),
        "by_model": counts["model"],
        "by_fallback": counts["fallback"],
        **stamp,
        "recommendations_version": version,
        "cpu_s": round(cpu_s, 1),
        "users_per_s": round(counts.total() / seconds, 1),
    }
    return Report("recommend", f"lists for {counts.total():,} users", figures)


class BucketRecommender:
    """An actor: a model in memory that makes the lists of one bucket after the other."""

    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.num_threads)
        self._order = order
        self._maker = ListMaker(
            load_artifact(order.artifact),
            device="cuda" if order.device == "cuda" else "cpu",
            variant=order.variant,
            num_threads=order.num_threads,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Writes the lists of the bucket in the only row, uncommitted; returns its part."""
        started = time.process_time()
        bucket, order = Bucket(**json.loads(batch["bucket"][0].as_py())), self._order
        id_type = order.schema.field("user_id").type
        users = read_users(bucket, id_type, order.history_events, order.options)
        tables = [make_lists(self._maker, some, order) for some in users]
        if not tables:
            return pa.table({"made": pa.array([], pa.string())})
        rows = pa.concat_tables(tables)
        part = write_rows(order.lake_uri, TABLE, rows, bucket.number, order.options)
        made = {
            "part": asdict(part),
            "counts": Counter(rows["source"].to_pylist()),
            "cpu_s": time.process_time() - started,
        }
        return pa.table({"made": [json.dumps(made)]})


def make_lists(maker: ListMaker, users: pa.Table, order: Order) -> pa.Table:
    """A row a user, in the order given, as `recommendations_schema` without its bucket."""
    found = rank_users(maker, users, order)
    is_ranked_U = np.array([len(best.items) > 0 for best in found], bool)
    ranked = [best for best in found if len(best.items)]
    others = users.filter(pa.array(~is_ranked_U))
    rows = pa.concat_tables(
        [
            _as_rows(users["user_id"].filter(pa.array(is_ranked_U)), ranked, maker, order),
            _fall_back(maker, others, order),
        ]
    )
    places_U = np.concatenate([np.flatnonzero(is_ranked_U), np.flatnonzero(~is_ranked_U)])
    return rows.take(pa.array(np.argsort(places_U)))


def rank_users(maker: ListMaker, users: pa.Table, order: Order) -> list[Best]:
    """The model's list for each user, empty where it knows none of their items.

    Users of histories alike in length are ranked together, so that hardly any padding is encoded.
    """
    store = read_requests(users, maker.catalogue, maker.context, order.created_us)
    lengths_U = np.diff(store.offsets_U) - 1
    by_length = np.argsort(lengths_U, kind="stable")
    by_length = by_length[lengths_U[by_length] > 0]
    found = [_NO_LIST] * len(lengths_U)
    for start in range(0, len(by_length), order.batch_size):
        batch = by_length[start : start + order.batch_size]
        lists = maker.ranker.rank_users(store, batch, order.top_k, exclude_seen=order.filter_seen)
        for user, best in zip(batch.tolist(), lists, strict=True):
            found[user] = best
    return found


def make_queries(users: pa.Table, order: Order) -> list[Query]:
    """What the endpoint would ask for these users at the moment of the order."""
    times = users["timestamps"].cast(pa.list_(pa.int64()))
    lists = (users["item_ids"], times, users["event_types"], users["devices"])
    columns = (column.to_pylist() for column in (*lists, users["segment"]))
    return [
        Query(
            tuple(map(Event._make, zip(*of_user, strict=True))),
            RequestContext(order.created_us, segment=segment),
            order.top_k,
            order.filter_seen,
        )
        for *of_user, segment in zip(*columns, strict=True)
    ]


def _as_rows(
    user_ids: pa.ChunkedArray, ranked: Sequence[Best], maker: ListMaker, order: Order
) -> pa.Table:
    ends_U = np.cumsum([0, *(len(best.items) for best in ranked)])
    offsets = pa.array(ends_U, pa.int32())
    items = maker.catalogue.decode(np.concatenate([_NO_LIST.items, *(b.items for b in ranked)]))
    scores = np.concatenate([_NO_LIST.scores, *(best.scores for best in ranked)])
    columns = {
        "user_id": user_ids,
        "item_ids": pa.ListArray.from_arrays(offsets, items),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(scores)),
        "source": pa.repeat("model", len(ranked)),
    }
    return _complete(columns, maker, order)


def _fall_back(maker: ListMaker, users: pa.Table, order: Order) -> pa.Table:
    made = maker.make(make_queries(users, order))
    columns = {
        "user_id": users["user_id"],
        "item_ids": [one.item_ids for one in made],
        "scores": [one.scores for one in made],
        "source": [one.source for one in made],
    }
    return _complete(columns, maker, order)


def _complete(columns: dict[str, Any], maker: ListMaker, order: Order) -> pa.Table:
    count = len(columns["user_id"])
    columns["model_version"] = pa.repeat(maker.ranker.info.model_version, count)
    columns["created_at"] = pa.repeat(order.created_us, count).cast(TIMESTAMP)
    return pa.table(columns, schema=order.schema)


def _open_artifact(config: PipelineConfig) -> Artifact:
    registry = Path(config.storage.registry_uri)
    version = config.recommend.version or serving_version(registry)
    artifact = load_artifact(registry / version)
    _refuse_unproven(artifact, config.recommend.variant)
    return artifact


def _refuse_unproven(artifact: Artifact, variant: Variant) -> None:
    """Raises: JobError when the variant did not pass `ray_jobs.export` before the publication."""
    path = artifact.path / "export.json"
    proven = json.loads(path.read_text())["variants"] if path.is_file() else {}
    if variant != "fp32" and variant not in proven:
        raise JobError(
            f"Version {artifact.version} was published without {variant} (it has "
            f"{', '.join(proven) or 'no export'}); name it in export.variants and publish again, "
            "or set recommend.variant to fp32."
        )


def _find_schema(artifact: Artifact, sequences: DeltaTable) -> pa.Schema:
    """Of the table. Raises: JobError when the version knows items by other ids than the lake."""
    there = pa.schema(sequences.schema())
    theirs = artifact.catalogue.item_ids.type
    ours = there.field("item_ids").type.value_type
    if pa.types.is_integer(theirs) != pa.types.is_integer(ours):
        raise JobError(
            f"Version {artifact.version} has item ids of type {theirs}, and the lake {ours}; name "
            "a version in recommend.version that was trained on this lake."
        )
    item_id: IdType = "int64" if pa.types.is_integer(ours) else "string"
    return recommendations_schema(id_type_of(there, "user_id"), item_id)


def _write_order(config: PipelineConfig, artifact: Artifact, schema: pa.Schema) -> Order:
    wanted = config.recommend
    return Order(
        artifact.path,
        config.storage.lake_uri,
        config.storage.options,
        schema.remove(schema.get_field_index(PARTITION)),
        round(datetime.now(UTC).timestamp() * 1e6),
        wanted.top_k,
        wanted.filter_seen,
        wanted.batch_size,
        config.publish.history_events,
        max(1, int(wanted.cpus_per_actor)),
        "cuda" if wanted.gpus_per_actor else "cpu",
        wanted.variant,
    )


def _make_all(
    config: PipelineConfig, order: Order, buckets: Sequence[Bucket]
) -> Iterator[dict[str, Any]]:
    """What each actor says of each bucket, as it is done."""
    wanted = config.recommend
    given = ray.data.from_items(
        [{"bucket": json.dumps(asdict(bucket))} for bucket in buckets],
        override_num_blocks=len(buckets),
    )
    made = given.map_batches(
        BucketRecommender,
        fn_constructor_args=(order,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=wanted.num_actors),
        num_cpus=wanted.cpus_per_actor,
        num_gpus=wanted.gpus_per_actor,
    )
    for row in made.iter_rows():
        yield json.loads(row["made"])


def _replace(table: DeltaTable, parts: Sequence[Part], stamp: dict[str, Any]) -> int:
    """Puts all lists in the place of those that are there."""
    return commit_parts(
        table,
        parts,
        removes=[file for files in files_by_bucket(table).values() for file in files],
        metadata={_STAMP: json.dumps(stamp)},
        # Of two runs at a time, each of which would add all users, one loses.
        transactions=[("recommend", table.version())],
    )


if __name__ == "__main__":
    main(run, job="recommend")
