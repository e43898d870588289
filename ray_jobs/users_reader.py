"""Whom lists are made for, a bucket of the lake at a time: users with a sequence, and those who are
in the tables of users and events alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from data_lake.parquet import read_files, read_in_parts
from data_lake.schemas import TIMESTAMP
from data_lake.tables import files_by_bucket, open_table, table_exists
from ray_jobs.config import PipelineConfig
from ray_jobs.materialize import recent_events

USERS_AT_ONCE = 8192
"""Histories in memory; enough that many of them are alike in length."""
LISTS = ("item_ids", "event_types", "timestamps", "devices")


@dataclass(frozen=True)
class Bucket:
    """Files of the users of one bucket."""

    number: int
    sequences: list[str]
    users: list[str]
    events: list[str]
    """Empty, as `users`, where those without a sequence get no list."""


def look_at_buckets(config: PipelineConfig, sequences: DeltaTable) -> list[Bucket]:
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


def read_users(
    bucket: Bucket, id_type: pa.DataType, history_events: int, options: Mapping[str, str]
) -> Iterator[pa.Table]:
    """The users of a bucket, at most `USERS_AT_ONCE` at a time, in the columns of the sequences
    table: first those with a sequence, of which the last `history_events`, then the others, whose
    lists are empty.
    """
    known: list[pa.Array] = []
    columns = ["user_id", "segment", *LISTS]
    for part in read_in_parts(bucket.sequences, columns, options, num_rows=USERS_AT_ONCE):
        known += part["user_id"].chunks
        yield recent_events(part, history_events)
    if bucket.users or bucket.events:
        newcomers = _read_newcomers(bucket, pa.chunked_array(known, id_type), options)
        for start in range(0, newcomers.num_rows, USERS_AT_ONCE):
            yield _with_empty_lists(newcomers.slice(start, USERS_AT_ONCE))


def _read_newcomers(bucket: Bucket, known: pa.ChunkedArray, options: Mapping[str, str]) -> pa.Table:
    """Ids and segments of the users of the users and events tables who have no sequence."""
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
        }
    )


def _with_empty_lists(users: pa.Table) -> pa.Table:
    offsets = pa.array(np.zeros(users.num_rows + 1, np.int32))
    for name in LISTS:
        kind = TIMESTAMP if name == "timestamps" else pa.string()
        users = users.append_column(name, pa.ListArray.from_arrays(offsets, pa.array([], kind)))
    return users
