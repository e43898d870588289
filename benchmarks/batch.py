"""Lists for every user of a shop: users per second and peak memory of `ray_jobs.recommend`.

    python -m benchmarks.batch --users 1_000_000 --actors 2 --variant int8

The version has the sizes of the case study and random weights, exported as a published one is; the
histories have 5 to 49 events, a few items often and most seldom. Everything that the job does is
counted: from reading the sequences to the commit. Memory is the peak over all processes, Ray's own
included; what a Ray of this size holds that does nothing is measured before.

Puts its run among those of `benchmarks/results/batch.json`, one for each number of users and each
variant, and writes `batch.md` of all; the last line printed is one JSON object.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from benchmarks.measure import PeakMemory, machine
from benchmarks.serving_artifact import Shape, publish_random
from data_lake.buckets import bucket_of
from data_lake.schemas import TIMESTAMP, sequences_schema
from data_lake.tables import commit_parts, create_table, write_part
from ray_jobs import recommend
from ray_jobs.config import PipelineConfig
from recsys.encoders import Variant

VARIANTS: tuple[Variant, ...] = ("fp32", "bf16", "int8")
RESULTS = Path(__file__).parent / "results"
USERS_PER_BUCKET = 20_000
SHORTEST, LONGEST = 5, 49
NOW_US = 1_760_000_000_000_000
MINUTE_US = 60_000_000
GIB = 2**30


@dataclass(frozen=True)
class Result:
    """What a run took."""

    users: int
    actors: int
    batch_size: int
    seconds: float
    cpu_s: float
    """Of the actors, from a bucket's files to its lists, without their start."""
    idle_bytes: int
    peak_bytes: int
    peak_by_kind: dict[str, int]
    variant: str = "fp32"
    machine: str = ""

    @property
    def users_per_s(self) -> float:
        return self.users / self.seconds


def main() -> None:
    """Parses, runs in a folder of its own, records."""
    arguments = parse_arguments()
    root = Path(tempfile.mkdtemp(prefix="batch-", dir=arguments.root))
    shape = Shape(items=arguments.items)
    try:
        write_shop(root, shape, arguments.users)
        config = make_config(root, arguments.actors, arguments.batch_size, arguments.variant)
        result = measure(config, arguments.users, arguments.object_store_gib)
    finally:
        shutil.rmtree(root)
    results = remember(RESULTS / "batch.json", result)
    (RESULTS / "batch.md").write_text(render(shape, results))
    print(json.dumps({**asdict(result), "users_per_s": result.users_per_s}))


def parse_arguments() -> argparse.Namespace:
    """Sizes of the shop and of the cluster."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=Shape().items)
    parser.add_argument("--actors", type=int, default=2, help="of one CPU each")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--variant", choices=VARIANTS, default="fp32", help="of the encoder")
    parser.add_argument("--object-store-gib", type=float, default=0.5)
    parser.add_argument("--root", type=Path, help="where to work; a temporary folder if unset")
    return parser.parse_args()


def make_config(root: Path, actors: int, batch_size: int, variant: Variant) -> PipelineConfig:
    """The sections that the job reads."""
    recommend = {"num_actors": actors, "batch_size": batch_size, "variant": variant}
    return PipelineConfig.model_validate(
        {
            "name": "batch",
            "storage": {"root": str(root)},
            "ingest": {"events": [{"path": "none", "format": "csv", "columns": {}}]},
            "recommend": recommend,
        }
    )


def write_shop(root: Path, shape: Shape, num_users: int) -> None:
    """A registry with the version, and the sequences of all users."""
    (root / "registry").mkdir()
    publish_random(root / "registry", shape, VARIANTS)
    lake = str(root / "lake")
    num_buckets = max(2, num_users // USERS_PER_BUCKET)
    schema = sequences_schema("int64", "int64")
    table = create_table(lake, "sequences", schema, num_buckets=num_buckets)
    users = np.arange(num_users)
    buckets = bucket_of(pa.array(users), num_buckets)
    parts = [
        write_part(lake, "sequences", draw_sequences(users[buckets == bucket], shape), bucket)
        for bucket in range(num_buckets)
        if (buckets == bucket).any()
    ]
    commit_parts(table, parts)


def draw_sequences(users: np.ndarray, shape: Shape) -> pa.Table:
    """A row a user, an event a minute until now."""
    rng = np.random.default_rng(int(users[0]))
    lengths_U = rng.integers(SHORTEST, LONGEST + 1, len(users))
    offsets_U = np.concatenate([[0], np.cumsum(lengths_U)])
    num_events = offsets_U[-1]
    ages_T = np.repeat(offsets_U[1:], lengths_U) - np.arange(num_events)
    values = {
        "item_ids": pa.array((shape.items * rng.random(num_events) ** 3).astype(np.int64)),
        "event_types": _constant("view", num_events),
        "timestamps": pa.array(NOW_US - MINUTE_US * ages_T).cast(TIMESTAMP),
        "devices": _constant("mobile", num_events),
    }
    offsets = pa.array(offsets_U, pa.int32())
    lists = {name: pa.ListArray.from_arrays(offsets, column) for name, column in values.items()}
    segments = pa.nulls(len(users), pa.string())
    return pa.table({"user_id": users, "segment": segments, **lists})


def measure(config: PipelineConfig, num_users: int, object_store_gib: float) -> Result:
    """One run of the job in a Ray of its own."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    wanted = config.recommend
    ray.init(
        num_cpus=wanted.num_actors,
        object_store_memory=int(object_store_gib * GIB),
        include_dashboard=False,
        logging_level="WARNING",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        with PeakMemory() as idle:
            pass
        started = time.perf_counter()
        with PeakMemory() as memory:
            report = recommend.run(config)
        seconds = time.perf_counter() - started
    finally:
        ray.shutdown()
    assert report.figures["by_model"] == num_users
    return Result(
        num_users,
        wanted.num_actors,
        wanted.batch_size,
        seconds,
        report.figures["cpu_s"],
        idle.peak_bytes,
        memory.peak_bytes,
        memory.by_kind_at_peak,
        wanted.variant,
        machine(),
    )


def remember(path: Path, result: Result) -> list[Result]:
    """Puts a run in the place of one like it; returns all, the fewest users first."""
    before = json.loads(path.read_text()) if path.exists() else []
    results = {(one["users"], one["variant"]): Result(**one) for one in before}
    results[result.users, result.variant] = result
    ordered = [results[key] for key in sorted(results)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([asdict(one) for one in ordered], indent=1))
    return ordered


def render(shape: Shape, results: Sequence[Result]) -> str:
    """The record as Markdown."""
    largest = max(results, key=lambda one: one.users)
    is_whole = largest.users >= 1_000_000
    missing = f"1,000,000 users were not measured: the largest run had {largest.users:,}."
    return "\n".join(
        [
            "# Lists for every user",
            "",
            f"{largest.machine}",
            f"Regenerate: `python -m benchmarks.batch --users {largest.users} --actors "
            f"{largest.actors} --variant {largest.variant}`, a row a run.",
            "",
            f"{shape}; random weights, the encoder exported, exact search. Histories of "
            f"{SHORTEST} to {LONGEST} events, {USERS_PER_BUCKET:,} users a bucket, top 10, seen "
            f"items left out, batches of {largest.batch_size}.",
            "",
            "| users | encoder | where | s | users/s | users/CPU-s | peak GiB | Ray alone GiB "
            "| at the peak, GiB |",
            "|---:|---|---|---:|---:|---:|---:|---:|---|",
            *map(_row, results),
            "",
            "A CPU-second is one of an actor at work, the compilation of its loops included; where "
            "other programs have the cores too, it tells more than the wall clock. The seconds "
            "count the start of the actors.",
            "",
            *([] if is_whole else [missing, ""]),
        ]
    )


def _row(result: Result) -> str:
    kinds = ", ".join(
        f"{kind} {num_bytes / GIB:.2f}"
        for kind, num_bytes in sorted(result.peak_by_kind.items(), key=lambda one: -one[1])
    )
    actors = f"{result.actors} actor{'s' if result.actors > 1 else ''} of one CPU"
    return (
        f"| {result.users:,} | {result.variant} | {actors} | {result.seconds:,.0f} "
        f"| {result.users_per_s:,.0f} | {result.users / result.cpu_s:,.0f} "
        f"| {result.peak_bytes / GIB:.2f} | {result.idle_bytes / GIB:.2f} | {kinds} |"
    )


def _constant(text: str, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), [text])


if __name__ == "__main__":
    main()
