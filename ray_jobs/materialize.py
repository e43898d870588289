"""Hands the most recent events of every user to serving, as Parquet files that an ingress with a
SQLite history loads before it is ready, and that are loaded into Redis or Feast from here.

    python -m ray_jobs.materialize --config synthetic --set serve.history=redis \\
        --set serve.redis_url=redis://127.0.0.1:6379

Writes `<storage root>/history/v<version of sequences>-last<events>/`, complete or not at all. A
file that a store has loaded before is not loaded again.
"""

import asyncio
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayTaskError

from data_lake.parquet import read_files
from data_lake.tables import files_by_bucket
from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.fan_out import one_block_each
from ray_jobs.job import Report, main
from ray_jobs.sections.storage import expand
from ray_jobs.sequences_reader import open_sequences
from serve_app.history_stores import ServeError
from serve_app.history_stores.opening import open_store
from serve_app.history_stores.seeds import load_seed

_LISTS = ("item_ids", "event_types", "timestamps", "devices")


def run(config: PipelineConfig) -> Report:
    """Writes the history of every user. Raises: JobError, TableError."""
    sequences = open_sequences(config)
    target = history_folder(config, sequences.version())
    if not target.exists():
        _write(config, files_by_bucket(sequences), target)
    users = sum(pq.read_metadata(file).num_rows for file in target.glob("*.parquet"))
    figures: dict[str, Any] = {"users": users, "path": str(target)}
    if config.serve.history != "sqlite":
        figures["users_loaded"] = _load(config, sorted(target.glob("*.parquet")))
    return Report("materialize", f"history of {users:,} users", figures)


def history_folder(config: PipelineConfig, sequences_version: int) -> Path:
    """Where the last `publish.history_events` events of one version of the sequences lie."""
    root = expand(config.storage.root)
    if "://" in root:
        raise JobError(f"Serving reads its history from a folder, not from {root}.")
    return Path(root) / "history" / f"v{sequences_version}-last{config.publish.history_events}"


def recent_events(sequences: pa.Table, limit: int) -> pa.Table:
    """The last `limit` events of every user, in the columns of the sequences table."""
    sequences = sequences.combine_chunks()
    lengths_U = sequences["item_ids"].chunk(0).value_lengths().to_numpy(zero_copy_only=False)
    kept_U = np.minimum(lengths_U, limit)
    ends_U = np.cumsum(lengths_U)
    offsets_U = np.concatenate([[0], np.cumsum(kept_U)])
    within = np.arange(offsets_U[-1]) - np.repeat(offsets_U[:-1], kept_U)
    index = pa.array(np.repeat(ends_U - kept_U, kept_U) + within)

    offsets = pa.array(offsets_U, pa.int32())
    lists = {
        name: pa.ListArray.from_arrays(offsets, sequences[name].chunk(0).flatten().take(index))
        for name in _LISTS
    }
    return pa.table({"user_id": sequences["user_id"], "segment": sequences["segment"], **lists})


def _load(config: PipelineConfig, files: Sequence[Path]) -> int:
    """Loads files into the online store, a task each; returns the number of users.

    Raises: JobError when the store cannot be reached.
    """
    chosen = config.serve
    address = {
        "kind": chosen.history,
        "redis_url": chosen.redis_url,
        "feast_repo": None if chosen.feast_repo is None else Path(expand(chosen.feast_repo)),
    }
    load = ray.remote(_load_file)
    # The first one alone: it may have to create the tables of a new store.
    counts: list[int] = []
    try:
        for some in (files[:1], files[1:]):
            counts += ray.get([load.remote(file, address) for file in some])
    except RayTaskError as error:
        if isinstance(error.cause, ServeError):
            raise JobError(str(error.cause)) from None
        raise
    return sum(counts)


def _load_file(file: Path, address: dict[str, Any]) -> int:
    store = open_store(**address)
    try:
        return load_seed(store, file)
    finally:
        asyncio.run(store.close())


def _write(config: PipelineConfig, files: dict[int, list[str]], target: Path) -> None:
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    buckets = [{"bucket": bucket, "files": paths} for bucket, paths in sorted(files.items())]
    try:
        one_block_each(buckets).map_batches(
            _write_bucket,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={
                "folder": temporary,
                "limit": config.publish.history_events,
                "options": config.storage.options,
            },
        ).materialize()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_bucket(
    batch: pa.Table, *, folder: Path, limit: int, options: dict[str, str]
) -> pa.Table:
    bucket = batch["bucket"][0].as_py()
    sequences = read_files(batch["files"][0].as_py(), ["user_id", "segment", *_LISTS], options)
    pq.write_table(recent_events(sequences, limit), folder / f"bucket-{bucket:05d}.parquet")
    return batch.select(["bucket"])


if __name__ == "__main__":
    main(run, job="materialize")
