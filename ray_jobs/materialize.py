"""Hands the most recent events of every user to serving, as Parquet files that its history store
loads before it is ready.

    python -m ray_jobs.materialize --config synthetic

Writes `<storage root>/history/v<version of sequences>-last<events>/`, complete or not at all.
"""

import shutil
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from data_lake.parquet import read_files
from data_lake.tables import files_by_bucket
from ray_jobs.config import PipelineConfig, expand
from ray_jobs.errors import JobError
from ray_jobs.job import Report, main
from ray_jobs.sequences_reader import open_sequences

_LISTS = ("item_ids", "event_types", "timestamps", "devices")


def run(config: PipelineConfig) -> Report:
    """Writes the history of every user. Raises: JobError, TableError."""
    sequences = open_sequences(config)
    target = history_folder(config, sequences.version())
    if not target.exists():
        _write(config, files_by_bucket(sequences), target)
    users = sum(pq.read_metadata(file).num_rows for file in target.glob("*.parquet"))
    return Report(
        "materialize", f"history of {users:,} users", {"users": users, "path": str(target)}
    )


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


def _write(config: PipelineConfig, files: dict[int, list[str]], target: Path) -> None:
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    buckets = [{"bucket": bucket, "files": paths} for bucket, paths in sorted(files.items())]
    try:
        ray.data.from_items(buckets, override_num_blocks=len(buckets)).map_batches(
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
