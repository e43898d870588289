"""Makes a list for every user with a published version, and puts them into the lake.

    python -m ray_jobs.recommend --config synthetic --set recommend.top_k=20

Lists are those that the endpoint would give at the same moment to the same histories and segments.
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
import pyarrow.compute as pc
import ray.data
import torch
from deltalake import DeltaTable

from data_lake.parquet import read_files
from data_lake.schemas import (
    PARTITION,
    TIMESTAMP,
    IdType,
    id_type_of,
    recommendations_schema,
)
from data_lake.tables import (
    Part,
    commit_parts,
    create_table,
    files_by_bucket,
    num_buckets_of,
    open_table,
    table_exists,
)
from data_lake.written import Written, write_rows
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main, timed
from ray_jobs.materialize import recent_events
from ray_jobs.sequences_reader import open_sequences
from recsys.artifact import Artifact, load_artifact
from recsys.list_maker import ListMaker, MadeList
from recsys.queries import Event, Query, RequestContext
from recsys.registry import serving_version

TABLE = "recommendations"
_STAMP = "nextitem.recommendations"
_LISTS = ("item_ids", "event_types", "timestamps", "devices")


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


@dataclass(frozen=True)
class Bucket:
    """Files of the users of one bucket."""

    number: int
    sequences: list[str]
    users: list[str]
    events: list[str]
    """Empty, as `users`, where those without a sequence get no list."""


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
            for made in _make_all(config, order, _look_at_buckets(config, sequences)):
                parts.append(Part(**made["part"]))
                written.add(TABLE, parts[-1])
                counts.update(made["counts"])
                cpu_s += made["cpu_s"]
        stamp = {
            "model_version": artifact.version,
            "sequences_version": sequences.version(),
            "top_k": order.top_k,
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
            num_threads=order.num_threads,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Writes the lists of the bucket in the only row, uncommitted; returns its part."""
        started = time.process_time()
        bucket, order = Bucket(**json.loads(batch["bucket"][0].as_py())), self._order
        tables = [make_lists(self._maker, users, order) for users in read_users(bucket, order)]
        if not any(table.num_rows for table in tables):
            return pa.table({"made": pa.array([], pa.string())})
        rows = pa.concat_tables(tables)
        part = write_rows(order.lake_uri, TABLE, rows, bucket.number, order.options)
        made = {
            "part": asdict(part),
            "counts": Counter(rows["source"].to_pylist()),
            "cpu_s": time.process_time() - started,
        }
        return pa.table({"made": [json.dumps(made)]})


def read_users(bucket: Bucket, order: Order) -> Iterator[pa.Table]:
    """The users of a bucket, in the columns of the sequences table: first those with a sequence,
    of which the last `history_events`, then the others, whose lists are empty.
    """
    known = pa.chunked_array([], order.schema.field("user_id").type)
    if bucket.sequences:
        columns = ["user_id", "segment", *_LISTS]
        sequences = read_files(bucket.sequences, columns, order.options)
        known = sequences["user_id"]
        yield recent_events(sequences, order.history_events)
    if bucket.users or bucket.events:
        yield _read_newcomers(bucket, known, order.options)


def make_lists(maker: ListMaker, users: pa.Table, order: Order) -> pa.Table:
    """A row a user, in the order given, as `recommendations_schema` without its bucket.

    Users of histories alike in length are ranked together, so that hardly any padding is encoded.
    """
    lengths_U = pc.list_value_length(users["item_ids"]).to_numpy()
    by_length = np.argsort(lengths_U, kind="stable")
    version = maker.ranker.info.model_version
    made = [order.schema.empty_table()]
    for start in range(0, len(by_length), order.batch_size):
        rows = users.take(pa.array(by_length[start : start + order.batch_size]))
        lists = maker.make(make_queries(rows, order))
        made.append(_as_rows(rows["user_id"], lists, version, order))
    return pa.concat_tables(made).take(pa.array(np.argsort(by_length, kind="stable")))


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


def _read_newcomers(bucket: Bucket, known: pa.ChunkedArray, options: dict[str, str]) -> pa.Table:
    """Users of the users and events tables who have no sequence."""
    users = pa.table({"user_id": known.slice(0, 0), "segment": pa.array([], pa.string())})
    if bucket.users:
        users = read_files(bucket.users, ["user_id", "segment"], options)
    # Events are far more than users: a file of them at a time.
    in_events = (read_files([file], ["user_id"], options)["user_id"] for file in bucket.events)
    found = [*users["user_id"].chunks, *map(pc.unique, in_events)]
    everyone = pc.unique(pa.chunked_array(found, known.type))
    newcomers = everyone.filter(pc.invert(pc.is_in(everyone, known)))
    segments = users["segment"].cast(pa.string())
    return pa.table(
        {
            "user_id": newcomers,
            "segment": segments.take(pc.index_in(newcomers, users["user_id"])),
            **{name: _empty_lists(len(newcomers), name) for name in _LISTS},
        }
    )


def _empty_lists(count: int, name: str) -> pa.Array:
    return pa.array([[]] * count, pa.list_(TIMESTAMP if name == "timestamps" else pa.string()))


def _as_rows(
    user_ids: pa.ChunkedArray, made: Sequence[MadeList], version: str, order: Order
) -> pa.Table:
    count = len(made)
    columns = {
        "user_id": user_ids,
        "item_ids": [one.item_ids for one in made],
        "scores": [one.scores for one in made],
        "model_version": [version] * count,
        "source": [one.source for one in made],
        "created_at": pa.array([order.created_us] * count, pa.int64()).cast(TIMESTAMP),
    }
    return pa.table(columns, schema=order.schema)


def _open_artifact(config: PipelineConfig) -> Artifact:
    registry = Path(config.storage.registry_uri)
    version = config.recommend.version or serving_version(registry)
    return load_artifact(registry / version)


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
    )


def _look_at_buckets(config: PipelineConfig, sequences: DeltaTable) -> list[Bucket]:
    """Every bucket that has a user who gets a list."""
    lake_uri, options = config.storage.lake_uri, config.storage.options
    files = {"sequences": files_by_bucket(sequences), "users": {}, "events": {}}
    if config.recommend.users == "all":
        for name in ("users", "events"):
            if table_exists(lake_uri, name, options):
                files[name] = files_by_bucket(open_table(lake_uri, name, options))
    numbers = sorted(set().union(*files.values()))
    return [
        Bucket(number, **{name: found.get(number, []) for name, found in files.items()})
        for number in numbers
    ]


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
