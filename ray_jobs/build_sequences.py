"""Builds the sequences table: one row a user, from whole buckets of events, in one commit.

    python -m ray_jobs.build_sequences --config synthetic

Only buckets whose events, users or rules changed are built again; the table is the same, bit for
bit, as if all of them were. While nothing changed it does nothing.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from deltalake import DeltaTable

from data_lake.build import Bucket, Build, build_row, count_bucket, digest_of
from data_lake.errors import TableError
from data_lake.schemas import context_columns_of, id_type_of, sequences_schema
from data_lake.sequences import find_rare_items
from data_lake.tables import (
    Part,
    commit_parts,
    create_table,
    files_by_bucket,
    last_metadata,
    num_buckets_of,
    open_table,
    table_exists,
)
from ray_jobs.config import PipelineConfig
from ray_jobs.fan_out import one_block_each
from ray_jobs.job import Report, main, timed

_STAMP = "nextitem.sequences"
_DIGESTS = "nextitem.buckets"


@dataclass(frozen=True)
class Sources:
    """The tables that sequences are made of; users are optional."""

    events: DeltaTable
    users: DeltaTable | None
    build: Build

    def stamp(self) -> dict[str, Any]:
        """What the sequences depend on: they are new while this is the same."""
        return {
            "events_version": self.events.version(),
            "users_version": self.users.version() if self.users else None,
            "rules": self.build.rules.digest(),
        }


@dataclass(frozen=True)
class Built:
    """What all tasks wrote, nothing of it committed yet."""

    parts: list[Part]
    digests: dict[int, str]
    """Of every bucket that has events."""
    rebuilt: set[int]
    counts: Counter[str]
    """Rows and users that the rules removed and kept, of the buckets that were built."""
    lengths: Counter[int]
    """How many users have how many positions."""


def run(config: PipelineConfig) -> Report:
    """Builds, commits once and says what each rule removed.

    Raises: TableError when events are missing or empty, or when the rules leave nobody;
        ConflictError when another build committed at the same time.
    """
    sources = _open_sources(config)
    stamp = sources.stamp()
    # What is there now is what the commit replaces: should it change meanwhile, the commit fails.
    sequences = _create_sequences(sources)
    if read_stamp(sequences) == stamp:
        return Report("build_sequences", "events and rules are unchanged, nothing to do", stamp)

    buckets = _look_at_buckets(sources, sequences)
    with timed("count items"):
        rare_items = _find_rare_items(sources.build, buckets)
    with timed("build sequences"):
        built = _build(replace(sources.build, rare_items=rare_items), buckets)
    version = _commit(sequences, built, stamp)
    figures = _figures(built) | stamp | {"sequences_version": version}
    return Report("build_sequences", _headline(built), figures)


def read_stamp(sequences: DeltaTable) -> dict[str, Any] | None:
    """Versions and rules that this version of the sequences table was built from; None if the log
    does not reach back so far.
    """
    newest = last_metadata(sequences, _STAMP)
    stamp: dict[str, Any] | None = None if newest is None else json.loads(newest)
    return stamp


def _open_sources(config: PipelineConfig) -> Sources:
    lake_uri, options = config.storage.lake_uri, config.storage.options
    events = open_table(lake_uri, "events", options)
    if not events.file_uris():
        raise TableError(
            f"The table 'events' in {lake_uri} has no rows; check [ingest] and run ray_jobs.ingest."
        )
    has_users = table_exists(lake_uri, "users", options)
    users = open_table(lake_uri, "users", options) if has_users else None
    schema = pa.schema(events.schema())
    ids = [name for name in ("user_id", "item_id") if id_type_of(schema, name) == "string"]
    build = Build(lake_uri, options, config.sequences, context_columns_of(schema), tuple(ids))
    return Sources(events, users, build)


def _create_sequences(sources: Sources) -> DeltaTable:
    schema, build = pa.schema(sources.events.schema()), sources.build
    ids = id_type_of(schema, "user_id"), id_type_of(schema, "item_id")
    return create_table(
        build.lake_uri,
        "sequences",
        sequences_schema(*ids, build.context),
        build.options,
        num_buckets=num_buckets_of(sources.events),
    )


def _look_at_buckets(sources: Sources, sequences: DeltaTable) -> list[Bucket]:
    """Every bucket that has events, with what is known of it."""
    users = files_by_bucket(sources.users) if sources.users else {}
    last_digests = json.loads(last_metadata(sequences, _DIGESTS) or "{}")
    build = sources.build

    def look_at(number: int, events: list[str]) -> Bucket:
        of_users = users.get(number, [])
        names = [file.rpartition("/")[2] for file in (*events, *of_users)]
        digest = digest_of([build.rules.digest(), build.context, names])
        return Bucket(number, events, of_users, digest, last_digests.get(str(number)))

    return [look_at(number, files) for number, files in files_by_bucket(sources.events).items()]


def _find_rare_items(build: Build, buckets: Sequence[Bucket]) -> pa.Array | None:
    rare_items = None
    if build.rules.min_item_events > 1:
        for _ in range(build.rules.core_passes):
            counted = _map_buckets(count_bucket, buckets, replace(build, rare_items=rare_items))
            counts = counted.iter_batches(batch_size=None, batch_format="pyarrow")
            known = 0 if rare_items is None else len(rare_items)
            rare_items = find_rare_items(counts, build.rules, rare_items)
            if len(rare_items) == known:
                break
    return rare_items


def _build(build: Build, buckets: Sequence[Bucket]) -> Built:
    built = Built(
        [], {bucket.number: bucket.digest for bucket in buckets}, set(), Counter(), Counter()
    )
    if build.rare_items is None:
        buckets = [bucket for bucket in buckets if bucket.digest != bucket.last_digest]
    if not buckets:
        return built
    for row in _map_buckets(build_row, buckets, build).take_all():
        one = json.loads(row["built"])
        built.digests[row["number"]] = one["digest"]
        if not one["is_new"]:
            continue
        built.rebuilt.add(row["number"])
        built.parts.extend(Part(**part) for part in one["parts"])
        built.counts.update(one["counts"])
        built.lengths.update({int(length): num for length, num in one["lengths"].items()})
    return built


def _map_buckets(
    function: Callable[[Bucket, Build], pa.Table], buckets: Sequence[Bucket], build: Build
) -> ray.data.Dataset:
    """One task a bucket: no shuffle, and memory is bounded by the largest bucket."""

    # A function inside of a function travels by value: workers need not import this module, which
    # knows all configurations and with them torch.
    def work(batch: pa.Table) -> pa.Table:
        (bucket,) = batch.to_pylist()
        return function(Bucket(**bucket), build)

    tasks = one_block_each([asdict(bucket) for bucket in buckets])
    return tasks.map_batches(work, batch_size=1, batch_format="pyarrow")


def _commit(sequences: DeltaTable, built: Built, stamp: dict[str, Any]) -> int:
    """Replaces the files of the buckets that were built, and of those that have no events left."""
    there = files_by_bucket(sequences)
    gone = [bucket for bucket in there if bucket in built.rebuilt or bucket not in built.digests]
    if not built.parts and len(gone) == len(there):
        raise TableError(
            f"The rules in [sequences] leave no user of {built.counts['users_read']:,}; loosen "
            "them, e.g. min_user_events."
        )
    return commit_parts(
        sequences,
        built.parts,
        removes=[file for bucket in gone for file in there[bucket]],
        metadata={_STAMP: json.dumps(stamp), _DIGESTS: json.dumps(built.digests)},
        # Of two builds at a time, each of which would add all users, one loses.
        transactions=[("build_sequences", sequences.version())],
    )


def _headline(built: Built) -> str:
    num_unchanged = len(built.digests) - len(built.rebuilt)
    users = f"{built.counts['users_kept']:,} sequences"
    return f"{users}, {num_unchanged} buckets as they were" if num_unchanged else users


def _figures(built: Built) -> dict[str, Any]:
    ends = {"events_kept", "users_kept"}
    rules = {name: num for name, num in built.counts.items() if num and name not in ends}
    kept = {name: built.counts[name] for name in sorted(ends)}
    buckets = {"buckets": len(built.digests), "buckets_built": len(built.rebuilt)}
    return rules | kept | _describe(built.lengths) | buckets


def _describe(lengths: Counter[int]) -> dict[str, int]:
    if not lengths:
        return {}
    sizes, users = np.array(sorted(lengths.items())).T
    middle = np.searchsorted(np.cumsum(users), users.sum() / 2)
    return {"median_length": int(sizes[middle]), "longest": int(sizes[-1])}


if __name__ == "__main__":
    main(run, job="build_sequences")
