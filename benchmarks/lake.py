"""From nothing to sequences: the synthetic shop generated, ingested and built, each stage measured.

    python -m benchmarks.lake --events 20_000_000

The stages are the jobs of `ray_jobs` with the configuration `shop-10m`, cut to size, in one Ray of
two CPUs. Two deliveries follow, each ingested and built into the sequences that are there: a new
day of 1 % of the events, whose users are in every bucket, and a few events of users of one bucket.
Memory is the peak over all processes, Ray's own included.

Writes `benchmarks/results/lake-<events>.md`; the last line printed is one JSON object.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from benchmarks.measure import PeakMemory, machine
from data_lake.buckets import bucket_of
from data_lake.parquet import encode_parquet
from data_lake.synthetic import DAY_US
from data_lake.tables import open_table
from ray_jobs import build_sequences, generate, ingest
from ray_jobs.config import PipelineConfig
from ray_jobs.job import Report, load_config
from ray_jobs.sections.storage import expand

RESULTS = Path(__file__).parent / "results"
CORES = 2
EVENTS_PER_PART = 500_000
EVENTS_PER_BUCKET = 1_500_000
GIB = 2**30


@dataclass(frozen=True)
class Stage:
    """What one run of one job took; `rows` are the events that it read or wrote."""

    name: str
    seconds: float
    rows: int
    peak_bytes: int
    peak_by_kind: dict[str, int]
    disk_bytes: int
    """Of what the stage has brought about, as it is now: raw files or a table."""


def main() -> None:
    """Parses, runs all stages in a folder of their own, records."""
    arguments = parse_arguments()
    root = Path(tempfile.mkdtemp(prefix="lake-", dir=arguments.root))
    try:
        config = cut_config(root, arguments.events, arguments.users, arguments.items)
        stages, idle_bytes = run_stages(config, arguments.object_store_gib)
    finally:
        if arguments.keep:
            _log(f"kept {root}")
        else:
            shutil.rmtree(root)
    _record(config, arguments, stages, idle_bytes)
    summary = {"events": stages[0].rows, "idle_bytes": idle_bytes}
    print(json.dumps(summary | {"stages": [asdict(stage) for stage in stages]}))


def parse_arguments() -> argparse.Namespace:
    """Sizes that are left out follow from the events: 20 a user, five users an item."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--users", type=int)
    parser.add_argument("--items", type=int)
    parser.add_argument("--root", type=Path, help="where to work; a temporary folder if unset")
    parser.add_argument("--keep", action="store_true", help="leave raw files and lake behind")
    parser.add_argument("--object-store-gib", type=float, default=1.5)
    arguments = parser.parse_args()
    arguments.users = arguments.users or max(1, arguments.events // 20)
    arguments.items = arguments.items or max(1_000, arguments.users // 5)
    return arguments


def cut_config(root: Path, events: int, users: int, items: int) -> PipelineConfig:
    """`shop-10m` in other sizes, with as many events a part and a bucket as there."""
    os.environ["NEXTITEM_HOME"] = str(root)
    sizes = {
        "generate.num_users": users,
        "generate.num_items": items,
        "generate.num_categories": max(30, items // 1_000),
        "generate.num_parts": max(1, events // EVENTS_PER_PART),
        "generate.mean_events_per_user": events / users,
        "ingest.num_buckets": max(4, events // EVENTS_PER_BUCKET),
    }
    return load_config("shop-10m", [f"{key}={value}" for key, value in sizes.items()])


def run_stages(config: PipelineConfig, object_store_gib: float) -> tuple[list[Stage], int]:
    """All stages in turn, and the memory of a Ray that does nothing yet."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        num_cpus=CORES,
        object_store_memory=int(object_store_gib * GIB),
        include_dashboard=False,
        logging_level="WARNING",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    with PeakMemory() as idle:
        pass
    stages = []
    for stage in _stages(config):
        _log(
            f"{stage.name}: {stage.seconds:.1f} s, {stage.rows / stage.seconds:,.0f} events/s, "
            f"peak {stage.peak_bytes / GIB:.2f} GiB"
        )
        stages.append(stage)
    ray.shutdown()
    return stages, idle.peak_bytes


def _stages(config: PipelineConfig) -> Iterator[Stage]:
    generated = _run("generate", generate.run, config, "raw", "rows_with_dirt")
    yield generated
    yield _run("ingest", ingest.run, config, "events", "read")
    yield _run("build sequences", build_sequences.run, config, "sequences", "events_read")
    for name, share, bucket in (("a day", 100, None), ("one bucket", 10_000, 0)):
        deliver(config, name, max(1, generated.rows // share), bucket)
        yield _run(f"{name}: ingest", ingest.run, config, "events", "read")
        yield _run(f"{name}: build", build_sequences.run, config, "sequences", "events_read")


def _run(
    name: str,
    job: Callable[[PipelineConfig], Report],
    config: PipelineConfig,
    written: str,
    rows: str,
) -> Stage:
    started = time.perf_counter()
    with PeakMemory() as memory:
        report = job(config)
        seconds = time.perf_counter() - started
    return Stage(
        name,
        round(seconds, 2),
        report.figures[rows],
        memory.peak_bytes,
        memory.by_kind_at_peak,
        _disk_bytes(config, written),
    )


def deliver(config: PipelineConfig, name: str, num_events: int, bucket: int | None) -> None:
    """Adds a file of new events: earlier ones of some users, under ids of their own, after the last
    day; of one bucket's users alone if one is given.
    """
    assert config.generate is not None
    found: list[pa.Table] = []
    for path in sorted(_raw(config).glob("events/part-*.parquet")):
        rows = pq.ParquetFile(path).read()
        rows = rows.filter(pc.starts_with(rows["event_id"], "e"))
        if bucket is not None:
            is_there = bucket_of(rows["user_id"], config.ingest.num_buckets) == bucket
            rows = rows.filter(pa.array(is_there))
        found.append(rows)
        if sum(part.num_rows for part in found) >= num_events:
            break
    rows = pa.concat_tables(found).slice(0, num_events)
    later = pc.add(rows["timestamp"].cast(pa.int64()), config.generate.days * DAY_US)
    columns = {
        "event_id": pc.binary_join_element_wise(name, rows["event_id"], " "),
        "timestamp": later.cast(rows.schema.field("timestamp").type),
    }
    rows = pa.table({name: columns.get(name, rows[name]) for name in rows.column_names})
    (_raw(config) / "events" / f"{name}.parquet").write_bytes(encode_parquet(rows))


def _raw(config: PipelineConfig) -> Path:
    return Path(expand(config.storage.root)) / "raw"


def _disk_bytes(config: PipelineConfig, written: str) -> int:
    if written == "raw":
        return sum(path.stat().st_size for path in _raw(config).rglob("*") if path.is_file())
    files = pa.table(open_table(config.storage.lake_uri, written).get_add_actions(flatten=True))
    return int(pc.sum(files["size_bytes"]).as_py())


def _record(
    config: PipelineConfig, arguments: argparse.Namespace, stages: list[Stage], idle_bytes: int
) -> None:
    shop = config.generate
    assert shop is not None
    rows = [
        f"| {stage.name} | {stage.seconds:,.1f} | {stage.rows:,} "
        f"| {stage.rows / stage.seconds:,.0f} | {stage.peak_bytes / GIB:.2f} "
        f"| {stage.peak_by_kind.get('ray workers', 0) / GIB:.2f} "
        f"| {stage.peak_by_kind.get('shared memory', 0) / GIB:.2f} "
        f"| {stage.disk_bytes / 2**20:,.0f} |"
        for stage in stages
    ]
    text = [
        f"# The lake from {arguments.events:,} events",
        "",
        f"`python -m benchmarks.lake --events {arguments.events} --users {arguments.users} "
        f"--items {arguments.items}`: {shop.num_parts} parts, {config.ingest.num_buckets} buckets, "
        f"a Ray of {CORES} CPUs and an object store of {arguments.object_store_gib} GiB, "
        f"{idle_bytes / GIB:.2f} GiB before it does anything.",
        f"{machine()}, Ray {ray.__version__}.",
        "",
        "| stage | wall, s | events | events/s | peak memory, GiB | of it workers "
        "| of it object store | on disk, MiB |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Events are those written or read, dirt included. `a day` brings 1 % more, of users in "
        "every bucket; `one bucket` 0.01 % more, of users of one bucket.",
    ]
    RESULTS.mkdir(exist_ok=True)
    millions = f"{arguments.events // 1_000_000}M"
    name = millions if arguments.events >= 1_000_000 else str(arguments.events)
    (RESULTS / f"lake-{name}.md").write_text("\n".join(text) + "\n")


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
