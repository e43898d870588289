"""One bucket's work, whole: read its files, build or count, write its part. What a task runs.

Nothing here needs more than pyarrow, so that a worker is ready soon and stays small.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_lake.parquet import read_files
from data_lake.schemas import PARTITION
from data_lake.sequences import (
    EVENT_COLUMNS,
    TEXT_COLUMNS,
    USER_COLUMNS,
    SequencesConfig,
    build_sequences,
    count_items,
    digest_rare,
)
from data_lake.tables import write_part

_COUNTED_COLUMNS = ("user_id", "item_id", "event_type")


@dataclass(frozen=True)
class Bucket:
    """The files of one bucket, and a digest of all that its sequences depend on."""

    number: int
    events: list[str]
    users: list[str]
    digest: str
    last_digest: str | None
    """Of the sequences that are there."""


@dataclass(frozen=True)
class Build:
    """What all buckets of one build have in common."""

    lake_uri: str
    options: Mapping[str, str]
    rules: SequencesConfig
    context: tuple[str, ...]
    """Columns of the shop's own that events carry."""
    text_ids: tuple[str, ...]
    """Those of user_id and item_id that are text."""
    rare_items: pa.Array | None = None


def count_bucket(bucket: Bucket, build: Build) -> pa.Table:
    """Events per item, see `count_items`."""
    events = read_files(bucket.events, _COUNTED_COLUMNS, build.options)
    return count_items(events, build.rules, build.rare_items)


def build_row(bucket: Bucket, build: Build) -> pa.Table:
    """Builds and writes the sequences of a bucket, uncommitted.

    Returns a row for the way back to the driver: `number` and, as JSON, `built`: the digest,
    whether the sequences are new (`is_new`), and of new ones the parts (none where the rules leave
    nobody), the counts of the rules and how many users have how many positions.
    """
    digest = bucket.digest
    if build.rare_items is not None:
        items = read_files(bucket.events, ["item_id"], build.options)["item_id"]
        digest = digest_of([digest, digest_rare(items, build.rare_items)])
    built = {"digest": digest, "is_new": digest != bucket.last_digest}
    if built["is_new"]:
        built |= _build(bucket, build)
    return pa.table({"number": [bucket.number], "built": [json.dumps(built)]})


def _build(bucket: Bucket, build: Build) -> dict[str, Any]:
    sequences, counts = build_sequences(
        _read_events(bucket, build),
        read_files(bucket.users, USER_COLUMNS, build.options) if bucket.users else None,
        build.rules,
        rare_items=build.rare_items,
        context=build.context,
    )
    parts = []
    if sequences.num_rows:
        parts = [write_part(build.lake_uri, "sequences", sequences, bucket.number, build.options)]
    return {
        "parts": [asdict(part) for part in parts],
        "counts": counts,
        "lengths": _count_lengths(sequences),
    }


def digest_of(parts: Sequence[Any]) -> str:
    """A short digest of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read_events(bucket: Bucket, build: Build) -> pa.Table:
    columns = [name for name in (*EVENT_COLUMNS, *build.context) if name != PARTITION]
    texts = [*build.text_ids, *TEXT_COLUMNS, *build.context]
    events = read_files(bucket.events, columns, build.options, dictionary=texts)
    number = np.full(events.num_rows, bucket.number, np.int32)
    return events.append_column(PARTITION, pa.array(number))


def _count_lengths(sequences: pa.Table) -> dict[int, int]:
    counted = sequences["item_ids"].combine_chunks().value_lengths().value_counts()
    sizes, numbers = counted.field("values").to_pylist(), counted.field("counts").to_pylist()
    return dict(zip(sizes, numbers, strict=True))
