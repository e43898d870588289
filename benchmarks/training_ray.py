"""What Ray costs a training, for `benchmarks.training`: an epoch under Ray Train beside the plain
trainer, and the way from the sequences table to the first batch; and what the huge pages save that
the jobs ask for.

Sequences are drawn at random, a few items often and most seldom. Each measurement is a process of
its own, with a Ray of its own that has just started and has no worker yet.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data_lake.buckets import bucket_of
from data_lake.schemas import PARTITION, TIMESTAMP, sequences_schema
from data_lake.tables import commit_parts, create_table, write_part
from ray_jobs.config import PipelineConfig
from ray_jobs.job import HUGE_PAGES
from recsys.recipe import read_recipe
from recsys.splits import split_tokens
from recsys.targets import find_targets
from recsys.trainer import Trainer

WORKERS = (1, 2, 4)
EPOCHS = 4
"""The first one is not counted: nothing says when it began."""
ROUNDS = 2
ROUNDS_OF_PAGES = 4
USERS_PER_BUCKET = 50_000
START_US = 1_735_689_600_000_000
TIMEOUT_S = 3_600
CONTEXT = {"categorical": ["device", "segment"], "time": ["hour"]}


@dataclass(frozen=True)
class Size:
    """Users, items and events of a user."""

    users: int
    items: int
    events: int


SCALING, LOADING = Size(100_000, 5_000, 40), Size(1_000_000, 100_000, 20)
HUGE = Size(30_000, 5_000, 40)
QUICK = Size(600, 100, 20)


class _FirstBatchError(Exception):
    """The first batch has reached the model."""


def measure_scaling(size: Size) -> dict[str, Any]:
    """Seconds of an epoch of the plain trainer, and under Ray Train with each number of workers.

    One thread a worker. An epoch under Ray is the time from one line of its history to the next:
    training, validation, report and checkpoint. `overhead` is what one worker takes longer than
    the plain trainer, relative to it; the two take turns, `ROUNDS` times. Both ask for huge pages,
    as a job of its own does.
    """
    plain, workers = [], {num: [] for num in WORKERS}
    with tempfile.TemporaryDirectory() as folder:
        write_sequences(Path(folder), size)
        for _ in range(ROUNDS):
            plain.append(_ask("plain", folder, 1))
            workers[1].append(_ask("workers", folder, 1))
        for num in WORKERS[1:]:
            workers[num].append(_ask("workers", folder, num))
    plain_s = _median_of("epoch_s", plain)
    epoch_s = {num: _median_of("epoch_s", runs) for num, runs in workers.items()}
    return {
        "recipe": "bert4rec",
        "users": size.users,
        "plain_epoch_s": round(plain_s, 2),
        "workers": [
            {
                "workers": num,
                "epoch_s": round(epoch_s[num], 2),
                "tokens_per_s": round(_median_of("tokens_per_s", runs)),
                "start_s": round(_median_of("start_s", runs), 1),
            }
            for num, runs in workers.items()
        ],
        "overhead": round(epoch_s[1] / plain_s - 1, 4),
    }


def measure_huge_pages(size: Size) -> dict[str, Any]:
    """An epoch of the plain trainer with the huge pages that jobs ask for and without, in turn,
    `ROUNDS_OF_PAGES` times: seconds, of CPUs and of the clock, and page faults, in the medians.

    `saved` is the share of the CPUs' seconds without them that is not needed with them.
    """
    runs: dict[str, list[dict[str, Any]]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        write_sequences(Path(folder), size)
        for _ in range(ROUNDS_OF_PAGES):
            runs["without"].append(_ask("plain", folder, 1, dict.fromkeys(HUGE_PAGES, "")))
            runs["with"].append(_ask("plain", folder, 1))
    medians = {
        side: {name: round(_median_of(name, of), 2) for name in ("epoch_s", "cpu_s", "faults")}
        for side, of in runs.items()
    }
    saved = 1 - medians["with"]["cpu_s"] / medians["without"]["cpu_s"]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "recipe": "bert4rec",
        "users": size.users,
        "pages": pages.read_text().strip() if pages.exists() else "none",
        **medians,
        "saved": round(saved, 4),
    }


def _median_of(name: str, runs: list[dict[str, Any]]) -> float:
    """Over all epochs of all runs."""
    return median(float(value) for run in runs for value in run[name])


def measure_loading(size: Size) -> dict[str, Any]:
    """Seconds from opening the sequences table until the first batch reaches the model."""
    with tempfile.TemporaryDirectory() as folder:
        write_sequences(Path(folder), size)
        stages = _ask("loading", folder, 1)
    seconds = {name: round(value, 2) for name, value in stages.items()}
    return {"users": size.users, "seconds": round(sum(stages.values()), 2), "stages": seconds}


def write_sequences(root: Path, size: Size) -> None:
    """The table that `ray_jobs.train` reads, seeded."""
    num_buckets = max(2, size.users // USERS_PER_BUCKET)
    schema = sequences_schema("int64", "int64")
    lake_uri = str(root / "lake")
    table = create_table(lake_uri, "sequences", schema, num_buckets=num_buckets)
    users = np.arange(1, size.users + 1)
    buckets = bucket_of(pa.array(users), num_buckets)
    commit_parts(
        table,
        [
            write_part(lake_uri, "sequences", draw_sequences(users[buckets == b], size, b), b)
            for b in range(num_buckets)
        ],
    )


def draw_sequences(users: np.ndarray, size: Size, bucket: int) -> pa.Table:
    """Rows of the sequences table: as many events of each user."""
    rng = np.random.default_rng([7, bucket])
    num_rows = len(users) * size.events
    offsets = pa.array(np.arange(0, num_rows + 1, size.events, dtype=np.int32))
    # Cubed, so that a few items are in most sequences and most are in few.
    items = 1 + (size.items * rng.random(num_rows) ** 3).astype(np.int64)
    gaps_us = rng.integers(1, 86_400_000_000, (len(users), size.events))
    times = pa.array(START_US + gaps_us.cumsum(1).ravel()).cast(TIMESTAMP)
    devices = pa.array(["mobile", "desktop"]).take(pa.array(rng.integers(0, 2, num_rows)))
    views = pa.array(["view"]).take(pa.array(np.zeros(num_rows, np.int8)))
    lists = {"item_ids": pa.array(items), "event_types": views, "timestamps": times}
    columns = {
        "user_id": pa.array(users),
        "segment": pa.array(["new", "loyal"]).take(pa.array(rng.integers(0, 2, len(users)))),
        **{
            name: pa.ListArray.from_arrays(offsets, values)
            for name, values in {**lists, "devices": devices}.items()
        },
        PARTITION: pa.array(np.full(len(users), bucket, np.int32)),
    }
    schema = sequences_schema("int64", "int64")
    return pa.table([columns[name] for name in schema.names], schema=schema)


def make_config(root: str, num_workers: int) -> PipelineConfig:
    """Our smallest production recipe on those sequences."""
    trainer = {"max_epochs": EPOCHS, "patience": EPOCHS, "validation_users": 1_000}
    return PipelineConfig.model_validate(
        {
            "name": "benchmark",
            "storage": {"root": root},
            "ingest": {"events": [{"path": "-", "format": "parquet", "columns": {}}]},
            "train": {
                "recipe": "bert4rec",
                "context": CONTEXT,
                "trainer": trainer,
                "name": f"workers-{num_workers}",
                "num_workers": num_workers,
                "device": "cpu",
            },
        }
    )


def train_plain(config: PipelineConfig) -> dict[str, Any]:
    """Epochs of the trainer in this process, on the tokens that the workers would have; the first
    one is not among them."""
    import ray

    torch.set_num_threads(1)
    trainer = _load(config, {})
    ray.shutdown()
    rates, spent = [], []
    for _ in range(EPOCHS):
        before = _spent()
        rates.append(trainer.train_epoch().tokens_per_s)
        spent.append(np.subtract(_spent(), before))
    epoch_s, cpu_s, faults = np.transpose(spent[1:]).tolist()
    return {"epoch_s": epoch_s, "tokens_per_s": rates[1:], "cpu_s": cpu_s, "faults": faults}


def _spent() -> tuple[float, float, float]:
    """Seconds of the clock and of CPUs, and page faults, of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_minflt


def train_workers(config: PipelineConfig) -> dict[str, Any]:
    """The job itself, its history watched from outside."""
    from ray_jobs import train

    moments: list[float] = []
    is_over = threading.Event()
    history = Path(config.storage.runs_uri) / str(config.train.name) / "history.jsonl"
    watcher = threading.Thread(target=_watch, args=(history, moments, is_over))
    watcher.start()
    started = time.perf_counter()
    try:
        train.run(config)
    finally:
        is_over.set()
        watcher.join()
    seconds = np.diff(moments).tolist()
    rates = [epoch["tokens_per_s"] for epoch in train.read_history(history.parent)]
    # Epochs are of one size, so the first one's rate tells how long it took.
    first_s = median(seconds) * median(rates[1:]) / rates[0]
    return {
        "epoch_s": seconds,
        "tokens_per_s": rates[1:],
        "start_s": [moments[0] - started - first_s],
    }


def time_loading(config: PipelineConfig) -> dict[str, float]:
    """Seconds of each stage until the first batch is there."""
    stages: dict[str, float] = {}
    trainer = _load(config, stages)
    started = time.perf_counter()
    trainer.model.register_forward_pre_hook(_stop)
    try:
        trainer.train_epoch()
    except _FirstBatchError:
        stages["first batch"] = time.perf_counter() - started
    return stages


def _load(config: PipelineConfig, stages: dict[str, float]) -> Trainer:
    """A trainer of the sequences, loaded as the workers of `ray_jobs.train` load them."""
    from ray_jobs.sequences_reader import (
        collect_tokens,
        learn_vocabulary,
        load_tokens,
        open_sequences,
    )

    marks = [time.perf_counter()]
    sequences = open_sequences(config)
    vocabulary = learn_vocabulary(sequences, config).vocabulary
    marks.append(time.perf_counter())
    tokens = load_tokens(sequences, config, vocabulary)
    marks.append(time.perf_counter())
    context = vocabulary.context
    store = collect_tokens(tokens, len(context.fields))
    marks.append(time.perf_counter())
    torch.manual_seed(config.seed)
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    targets = find_targets(config.train.targets, context)
    trainer = Trainer(
        recipe,
        config.train.trainer,
        vocabulary.make_model(recipe.model),
        store,
        split_tokens(store, config.split, targets),
        context.known_at_request_F,
        seed=config.seed,
        device=torch.device("cpu"),
        targets=targets,
    )
    marks.append(time.perf_counter())
    stages.update(zip(("vocabulary", "tokens", "store", "trainer"), np.diff(marks), strict=True))
    return trainer


def _stop(*_: Any) -> None:
    raise _FirstBatchError


def _watch(path: Path, moments: list[float], is_over: threading.Event) -> None:
    """Notes when each line of a file came."""
    while not is_over.wait(0.02):
        num_lines = len(path.read_text().splitlines()) if path.exists() else 0
        moments += [time.perf_counter()] * (num_lines - len(moments))


def _ask(
    what: str, root: str, num_workers: int, pages: Mapping[str, str] = HUGE_PAGES
) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_ray", what, "--root", root]
    command += ["--workers", str(num_workers)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        **pages,
    }
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
        env=os.environ | environment,
    )
    shutil.rmtree(Path(root) / "runs", ignore_errors=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """One measurement; prints what it found."""
    import ray

    parser = argparse.ArgumentParser(description="See benchmarks.training.")
    parser.add_argument("what", choices=_MEASURE)
    parser.add_argument("--root", required=True)
    parser.add_argument("--workers", type=int, required=True)
    arguments = parser.parse_args()
    # All workers that are tried must fit, whatever the machine has; else its own cores count.
    num_cpus = max(WORKERS) if arguments.what == "workers" else len(os.sched_getaffinity(0))
    ray.init(num_cpus=num_cpus, log_to_driver=False, logging_level="WARNING")
    found = _MEASURE[arguments.what](make_config(arguments.root, arguments.workers))
    ray.shutdown()
    print(json.dumps(found))


_MEASURE = {"plain": train_plain, "workers": train_workers, "loading": time_loading}

if __name__ == "__main__":
    main()
