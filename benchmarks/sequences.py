"""Sequences from events: `ray_jobs.build_sequences` beside Polars and DuckDB, on the same files.

    python -m benchmarks.sequences --events 20_000_000

Twenty events a user in random order, as an `events` table of 1.5 M events a bucket. Each engine
drops one of three event types, orders the rest by user and time and writes one row a user with four
lists (items, types, times, devices), zstd level 1. An engine runs in a process of its own; its wall
time begins with everything imported and, for ours, with a Ray that has just started and has no
worker yet. Memory is the peak over all processes of that run.

Writes `benchmarks/results/sequences-<events>.md`; the last line printed is one JSON object.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.measure import machine, measured
from data_lake.buckets import bucket_of, mix
from data_lake.schemas import PARTITION, TIMESTAMP, events_schema
from data_lake.tables import (
    Part,
    commit_parts,
    create_table,
    files_by_bucket,
    open_table,
    write_part,
)

RESULTS = Path(__file__).parent / "results"
ENGINES = ("ours", "polars", "duckdb")
EVENTS_PER_USER = 20
EVENTS_PER_BUCKET = 1_500_000
NUM_ITEMS = 2_000_000
TYPES, TYPE_SHARES = ("view", "add_to_cart", "purchase"), (0.8, 0.12, 0.08)
KEPT_TYPES = ("view", "purchase")
DEVICES = ("mobile", "desktop", "tablet", "app")
START_US, SPAN_US = 1_735_689_600_000_000, 90 * 86_400_000_000
LISTS = ("item_ids", "event_types", "timestamps", "devices")
CORES = 2


@dataclass(frozen=True)
class Run:
    """What one run of one engine took."""

    seconds: float
    peak_bytes: int


def main() -> None:
    """Parses; prepares the files, runs the engines in turn, compares and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine, in turn")
    parser.add_argument("--root", type=Path, help="folder for the files; a temporary one if unset")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps({"seconds": _RUN[arguments.engine](arguments.root)}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.root) as folder:
        summary = compare(Path(folder), arguments)
    print(json.dumps(summary))


def compare(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs of all engines on one table, and whether they agree."""
    num_users = arguments.events // EVENTS_PER_USER
    size_bytes = write_events(root, num_users)
    _log(f"{arguments.events:,} events in {size_bytes / 2**20:,.0f} MiB")
    runs: dict[str, list[Run]] = {engine: [] for engine in ENGINES}
    for _ in range(arguments.repeats):
        for engine in ENGINES:
            runs[engine].append(run_engine(engine, root))
            _log(f"{engine}: {asdict(runs[engine][-1])}")
    digests = [digest_output(output_files(engine, root)) for engine in ENGINES]
    same = all(
        np.array_equal(users, digests[0][0]) and np.array_equal(hashes, digests[0][1])
        for users, hashes in digests
    )
    summary: dict[str, Any] = {"events": arguments.events, "users": len(digests[0][0])}
    for engine, of_engine in runs.items():
        summary[f"{engine}_s"] = round(median(run.seconds for run in of_engine), 2)
    for engine, of_engine in runs.items():
        summary[f"{engine}_peak_bytes"] = max(run.peak_bytes for run in of_engine)
    summary["same_result"] = same
    _record(arguments.events, size_bytes, runs, same)
    return summary


def run_engine(engine: str, root: Path) -> Run:
    """One run in a process of its own."""
    output = root / "lake" / "sequences" if engine == "ours" else root / engine
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.sequences", "--engine", engine]
    found = measured([*command, "--root", str(root)])
    return Run(json.loads(found.stdout.splitlines()[-1])["seconds"], found.peak_bytes)


def write_events(root: Path, num_users: int) -> int:
    """The table that all engines read, seeded; its size in bytes."""
    num_buckets = max(1, round(num_users * EVENTS_PER_USER / EVENTS_PER_BUCKET))
    schema = events_schema("int64", "int64")
    table = create_table(str(root / "lake"), "events", schema, num_buckets=num_buckets)
    users = 1_000_000 + np.arange(num_users)
    bucket = bucket_of(pa.array(users), num_buckets)
    order = np.argsort(bucket, kind="stable")
    edges = np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    with ProcessPoolExecutor(CORES) as pool:
        parts = list(
            pool.map(
                _write_bucket,
                [str(root / "lake")] * num_buckets,
                range(num_buckets),
                (users[order[edges[b] : edges[b + 1]]] for b in range(num_buckets)),
            )
        )
    commit_parts(table, parts)
    return sum(part.size_bytes for part in parts)


def _write_bucket(lake_uri: str, bucket: int, users: np.ndarray) -> Part:
    rng = np.random.default_rng([7, bucket])
    num_rows = len(users) * EVENTS_PER_USER
    # Cubed, so that a few items are in most sequences and most are in few.
    item = 5_000_000 + (NUM_ITEMS * rng.random(num_rows) ** 3).astype(np.int64)
    columns = {
        "event_id": pc.binary_join_element_wise(
            str(bucket), pa.array(np.arange(num_rows)).cast(pa.string()), "-"
        ),
        "user_id": pa.array(rng.permutation(np.repeat(users, EVENTS_PER_USER))),
        "item_id": pa.array(item),
        "event_type": _draw(rng, TYPES, TYPE_SHARES, num_rows),
        "timestamp": pa.array(START_US + rng.integers(0, SPAN_US, num_rows)).cast(TIMESTAMP),
        "device": _draw(rng, DEVICES, None, num_rows),
        "ingested_at": pa.array(np.full(num_rows, START_US + SPAN_US)).cast(TIMESTAMP),
        "arrival": pa.array(np.arange(num_rows)),
        PARTITION: pa.array(np.full(num_rows, bucket, np.int32)),
    }
    schema = events_schema("int64", "int64")
    rows = pa.table(
        [columns.get(field.name, pa.nulls(num_rows, field.type)) for field in schema],
        names=schema.names,
    )
    return write_part(lake_uri, "events", rows, bucket)


def _draw(
    rng: np.random.Generator, values: Sequence[str], shares: Sequence[float] | None, num: int
) -> pa.Array:
    return pa.array(values).take(pa.array(rng.choice(len(values), num, p=shares)))


def event_files(root: Path) -> list[str]:
    """The table's files, as every engine gets them."""
    table = open_table(str(root / "lake"), "events")
    return [file for files in files_by_bucket(table).values() for file in files]


def output_files(engine: str, root: Path) -> list[str]:
    """What an engine wrote."""
    if engine == "ours":
        table = open_table(str(root / "lake"), "sequences")
        return [file for files in files_by_bucket(table).values() for file in files]
    return sorted(str(path) for path in (root / engine).glob("*.parquet"))


def run_ours(root: Path) -> float:
    """The job itself, on a Ray of two cores."""
    import ray

    from ray_jobs import build_sequences
    from ray_jobs.config import PipelineConfig

    config = PipelineConfig.model_validate(
        {
            "name": "benchmark",
            "storage": {"root": str(root)},
            "ingest": {"events": [{"path": "-", "format": "parquet", "columns": {}}]},
            "sequences": {
                "event_types": KEPT_TYPES,
                "drop_repeats": False,
                "min_user_events": 1,
            },
        }
    )
    ray.init(num_cpus=CORES, include_dashboard=False, logging_level="WARNING")
    started = time.perf_counter()
    build_sequences.run(config)
    seconds = time.perf_counter() - started
    ray.shutdown()
    return seconds


def run_polars(root: Path) -> float:
    """The streaming engine, in the shape that it is fastest in."""
    import polars as pl

    (root / "polars").mkdir()
    names = dict(zip(("item_id", "event_type", "timestamp", "device"), LISTS, strict=True))
    lists = [pl.col(column).sort_by("timestamp").alias(name) for column, name in names.items()]
    started = time.perf_counter()
    (
        pl.scan_parquet(event_files(root), hive_partitioning=False)
        .filter(pl.col("event_type").is_in(KEPT_TYPES))
        .with_columns(pl.col("event_type", "device").cast(pl.Categorical))
        .group_by("user_id")
        .agg(lists)
        .sink_parquet(
            root / "polars/sequences.parquet",
            compression="zstd",
            compression_level=1,
            engine="streaming",
        )
    )
    return time.perf_counter() - started


def run_duckdb(root: Path) -> float:
    """A list of structs a user, sorted as a whole: half the time of four ordered lists.

    Lists over a sorted subquery would be faster still, but not all of them come in order.
    """
    import duckdb

    (root / "duckdb").mkdir()
    database = duckdb.connect()
    database.execute(f"SET threads = {CORES}; SET temp_directory = '{root}/duckdb/spill'")
    started = time.perf_counter()
    database.execute(
        f"""
        COPY (
            SELECT user_id, list_transform(events, lambda x: x.i) AS item_ids,
                list_transform(events, lambda x: x.e) AS event_types,
                list_transform(events, lambda x: x.t) AS timestamps,
                list_transform(events, lambda x: x.d) AS devices
            FROM (
                SELECT user_id, list_sort(
                    list({{'t': timestamp, 'i': item_id, 'e': event_type, 'd': device}})
                ) AS events
                FROM read_parquet({event_files(root)!r}, hive_partitioning = false)
                WHERE event_type IN {KEPT_TYPES!r}
                GROUP BY user_id
            )
        ) TO '{root}/duckdb/sequences.parquet'
        (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)
        """
    )
    return time.perf_counter() - started


_RUN = {"ours": run_ours, "polars": run_polars, "duckdb": run_duckdb}


def digest_output(files: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Users in ascending order, and a 64-bit hash of each one's lists, order included: `[U]`."""
    with ProcessPoolExecutor(CORES) as pool:
        pieces = [piece for found in pool.map(_digest_file, files) for piece in found]
    users, hashes = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    order = np.argsort(users)
    return users[order], hashes[order]


def _digest_file(file: str) -> list[tuple[np.ndarray, np.ndarray]]:
    return [_digest_batch(batch) for batch in _batches(file)]


def _batches(file: str) -> Iterator[pa.RecordBatch]:
    return pq.ParquetFile(file).iter_batches(50_000, columns=["user_id", *LISTS])


def _digest_batch(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    lengths = batch["item_ids"].value_lengths().to_numpy()
    for name in LISTS:
        assert batch[name].value_lengths().to_numpy().tolist() == lengths.tolist()
    starts = np.cumsum(lengths) - lengths
    place = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    item = batch["item_ids"].flatten().to_numpy()
    time_us = batch["timestamps"].flatten().cast(TIMESTAMP).cast(pa.int64()).to_numpy()
    kind = pc.index_in(batch["event_types"].flatten().cast(pa.string()), pa.array(TYPES))
    device = pc.index_in(batch["devices"].flatten().cast(pa.string()), pa.array(DEVICES))
    codes = kind.to_numpy().astype(np.uint64) * np.uint64(16) + device.to_numpy().astype(np.uint64)
    hashes = mix(mix(mix(codes) ^ item.view(np.uint64)) ^ time_us.view(np.uint64))
    hashes = mix(hashes ^ place.astype(np.uint64))
    return batch["user_id"].to_numpy(), np.add.reduceat(hashes, starts)


def _record(events: int, size_bytes: int, runs: dict[str, list[Run]], same: bool) -> None:
    versions = [f"{name} {metadata.version(name)}" for name in ("ray", "polars", "duckdb")]
    ours = median(run.seconds for run in runs["ours"])
    rows = []
    for engine, of_engine in runs.items():
        seconds = [run.seconds for run in of_engine]
        peak = max(run.peak_bytes for run in of_engine) / 2**30
        rows.append(
            f"| {engine} | {median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} "
            f"| {events / median(seconds) / 1e6:.2f} | {median(seconds) / ours:.2f} "
            f"| {peak:.2f} |"
        )
    text = [
        f"# Sequences from {events:,} events",
        "",
        f"`python -m benchmarks.sequences --events {events}`: {events // EVENTS_PER_USER:,} users, "
        f"{NUM_ITEMS:,} items, rows in random order, {size_bytes / 2**20:,.0f} MiB of Parquet.",
        f"{machine()}; {', '.join(versions)}.",
        "",
        "| engine | wall, s (median) | range | M events/s | beside ours | peak memory, GiB |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"All sequences equal: {'yes' if same else 'NO'}.",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"sequences-{events // 1_000_000}M.md").write_text("\n".join(text) + "\n")


def _log(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
