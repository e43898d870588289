"""What a search costs and what it brings.

    python -m benchmarks.tune                            (all parts, two hours or so on two cores)
    python -m benchmarks.tune --parts overhead --trials 4 --epochs 3

gain: the synthetic shop, and MovieLens-1M at half the width; the winner of the search against the
shipped recipe, on validation users that no trial saw, each trained to the end with three seeds.
overhead: the same trainings one
after the other in a plain loop, as trials that train in their own process, and as trials of a Ray
Train group of one worker. packing: eight trials at once on two CPUs, and how long the head takes
to answer meanwhile. With --write `benchmarks/results/tune.md` is written; the last line printed is
one JSON object.
"""

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.measure import machine
from benchmarks.training_ray import CONTEXT, Size, write_sequences
from ray_jobs import build_sequences, generate, ingest, tune
from ray_jobs.config import PipelineConfig
from ray_jobs.job import load_config
from ray_jobs.sequences_reader import (
    collect_tokens,
    learn_vocabulary,
    load_tokens,
    open_sequences,
)
from ray_jobs.tuning.search import Data, search
from ray_jobs.tuning.searchers import GridSearch
from ray_jobs.tuning.space import Space
from ray_jobs.tuning.training import SearchTask, train_here
from ray_jobs.tuning.trials import TrialLog, busy_seconds
from recsys.tokens import TokenStore

RESULTS = Path(__file__).parent / "results"
NUM_CPUS = 2
AT_ONCE = 8
PARTS = ["gain-synthetic", "gain-ml-1m", "overhead", "packing"]
SMALLER = {"ml-1m": ("train.overrides.model.dim=32",)}
RATES = np.geomspace(5e-4, 4e-3, 64).tolist()


def measure_gain(data: str, trials: int, epochs: int, home: Path) -> dict[str, Any]:
    """The search as a user starts it; budget and verdict."""
    os.environ["NEXTITEM_HOME"] = str(home)
    config = load_config(
        data,
        [
            "tune.name=benchmark",
            f"tune.max_trials={trials}",
            f"tune.max_epochs={epochs}",
            f"tune.grace_epochs={max(1, epochs // 3)}",
            f"tune.random_trials={max(2, trials // 3)}",
            *SMALLER.get(data, ()),
        ],
    )
    if config.generate is not None:
        generate.run(config)
    for stage in (ingest, build_sequences):
        stage.run(config)
    figures = tune.run(config).figures
    folder = Path(figures["report"]).parent
    return {
        "trials": trials,
        "epochs": epochs,
        # Of all starts, where a search went on.
        "search_seconds": round(busy_seconds(TrialLog(folder / "trials.jsonl").read())),
        "verdict_seconds": round(figures["seconds"] - figures["search_seconds"]),
        "stopped_early": figures["stopped_early"],
        "failed": figures["failed"],
        **json.loads((folder / "outcome.json").read_text()),
    }


def measure_overhead(trials: int, epochs: int, users: int) -> dict[str, Any]:
    """Seconds of the same trainings, one at a time, and what each way takes longer than a loop."""
    with tempfile.TemporaryDirectory() as folder:
        write_sequences(Path(folder), Size(users, 1_000, 25))
        config = make_config(folder, trials, epochs)
        task, data = open_data(config)
        seconds = {"loop": _time(lambda: train_in_a_loop(task, data.store))}
        for launcher in ("process", "ray-train"):
            task, data = open_data(make_config(folder, trials, epochs, launcher=launcher))
            seconds[launcher] = _time(partial(run_trials, task, data))
    return {
        "users": users,
        "trials": trials,
        "epochs": epochs,
        "seconds": {name: round(one, 1) for name, one in seconds.items()},
        "overhead": {
            name: round(one / seconds["loop"] - 1, 3)
            for name, one in seconds.items()
            if name != "loop"
        },
    }


def measure_packing(epochs: int, users: int) -> dict[str, Any]:
    """The same eight trials two and eight at once; latency of a lookup in the head meanwhile."""
    found: dict[str, Any] = {"users": users, "trials": AT_ONCE, "epochs": epochs}
    with tempfile.TemporaryDirectory() as folder:
        write_sequences(Path(folder), Size(users, 1_000, 25))
        found["idle_ms"] = _summary(_idle_latencies())
        for at_once in (NUM_CPUS, AT_ONCE):
            config = make_config(folder, AT_ONCE, epochs, at_once=at_once)
            task, data = open_data(config)
            latencies: list[float] = []
            with _watching(latencies):
                seconds = _time(partial(run_trials, task, data))
            found[f"{at_once}_at_once"] = {
                "seconds": round(seconds, 1),
                "head_ms": _summary(latencies),
            }
    return found


def make_config(
    root: str, trials: int, epochs: int, *, launcher: str = "process", at_once: int = 1
) -> PipelineConfig:
    """`trials` learning rates of a small recipe, none of them stopped early."""
    rates = {"kind": "choice", "values": RATES[:trials]}
    return PipelineConfig.model_validate(
        {
            "name": "benchmark",
            "storage": {"root": root},
            "ingest": {"events": [{"path": "-", "format": "parquet", "columns": {}}]},
            "train": {
                "context": CONTEXT,
                "overrides": {"batch_size": 128},
                "trainer": {"max_epochs": epochs, "patience": epochs, "validation_users": 1_000},
                "num_workers": 1,
                "device": "cpu",
            },
            "tune": {
                "space": {"optimiser.learning_rate": rates},
                "searcher": "grid",
                "max_trials": trials,
                "grace_epochs": epochs,
                "cpus_per_trial": min(1, NUM_CPUS / at_once),
                "max_concurrent": at_once,
                "launcher": launcher,
            },
        }
    )


def open_data(config: PipelineConfig) -> tuple[SearchTask, Data]:
    """What all trials share, in a folder of its own."""
    sequences = open_sequences(config)
    vocabulary = learn_vocabulary(sequences, config).vocabulary
    tokens = load_tokens(sequences, config, vocabulary)
    store = collect_tokens(tokens, len(vocabulary.context.fields))
    folder = Path(tempfile.mkdtemp(dir=config.storage.root))
    return SearchTask(config, vocabulary, folder), Data(store, tokens)


def run_trials(task: SearchTask, data: Data) -> None:
    """All trials, to their end."""
    space = Space.of(task.config.tune.space)
    trials = search(task, data, GridSearch(space, 2), TrialLog(task.folder / "trials.jsonl"))
    endings = [trial.ending for trial in trials]
    assert endings == ["finished"] * task.config.tune.max_trials, endings


def train_in_a_loop(task: SearchTask, store: TokenStore) -> None:
    """The same trainings in this process, with as many threads as a trial has."""
    torch.set_num_threads(1)
    for values in Space.of(task.config.tune.space).grid(2):
        copied = TokenStore.concatenate([store])
        train_here(task.plan(values, task.config.seed), copied, lambda report: None)


def _time(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextlib.contextmanager
def _watching(latencies: list[float]) -> Iterator[None]:
    """Asks the head ten times a second, in seconds each."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.1):
            latencies.append(_time(ray.cluster_resources))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _idle_latencies() -> list[float]:
    return [_time(ray.cluster_resources) for _ in range(50)]


def _summary(latencies: list[float]) -> dict[str, float]:
    quantiles = np.quantile(latencies, (0.5, 0.99, 1.0)) * 1_000
    return dict(zip(("p50", "p99", "max"), quantiles.round(1).tolist(), strict=True))


def render(found: Mapping[str, Any]) -> str:
    """The figures of all parts that were measured, as Markdown."""
    blocks = ["# Searches", "`python -m benchmarks.tune --write`; figures in full: `tune.json`."]
    for name, part in found.items():
        blocks += [f"## {name}", f"{part['machine']}", RENDERERS[name.split("-")[0]](part)]
    return "\n\n".join(blocks) + "\n"


def _render_gain(part: Mapping[str, Any]) -> str:
    lines = [
        f"{part['trials']} trials of at most {part['epochs']} epochs, {part['stopped_early']} "
        f"stopped early, {part['failed']} failed; {part['search_seconds']:,} s of search, "
        f"{part['verdict_seconds']:,} s of final trainings.",
        f"{part['headline'][0].upper()}{part['headline'][1:]}.",
    ]
    verdict = part["verdict"]
    if verdict is not None:
        rows = zip(
            verdict["winner_ndcg10"],
            verdict["default_ndcg10"],
            verdict["differences_by_seed"],
            strict=True,
        )
        lines.append(
            _table(
                ("training", "NDCG@10 of the winner", "of the default", "difference"),
                [(n, *(f"{one:.4f}" for one in row)) for n, row in enumerate(rows, start=1)],
            )
        )
    values = part["winner"]["values"] if part["winner"] else {}
    lines.append(_table(("value of the winner", ""), list(values.items())))
    return "\n\n".join([*lines, *part["doubts"]])


def _render_overhead(part: Mapping[str, Any]) -> str:
    rows = [
        (name, seconds, f"{part['overhead'].get(name, 0):.1%}")
        for name, seconds in part["seconds"].items()
    ]
    what = f"{part['trials']} trainings of {part['epochs']} epochs, {part['users']:,} users."
    return f"{what}\n\n" + _table(("trainings run", "seconds", "more than a loop"), rows)


def _render_packing(part: Mapping[str, Any]) -> str:
    rows = [("none", "", *part["idle_ms"].values())]
    for at_once in (NUM_CPUS, AT_ONCE):
        one = part[f"{at_once}_at_once"]
        rows.append((at_once, one["seconds"], *one["head_ms"].values()))
    header = ("trials at once", "seconds", "head's answer p50, ms", "p99", "max")
    what = (
        f"{part['trials']} trials of {part['epochs']} epochs on {part['users']:,} users, "
        f"{NUM_CPUS} CPUs."
    )
    return f"{what}\n\n" + _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


RENDERERS = {"gain": _render_gain, "overhead": _render_overhead, "packing": _render_packing}


def write(found: Mapping[str, Any]) -> None:
    """Puts new figures in the place of the former ones of the same part."""
    path = RESULTS / "tune.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    known = before | dict(found)
    ordered = {name: known[name] for name in PARTS if name in known}
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    (RESULTS / "tune.md").write_text(render(ordered))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--users", type=int, default=20_000, help="of overhead and packing")
    parser.add_argument("--home", type=Path, help="keeps searches, which go on if they were ended")
    parser.add_argument("--write", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=NUM_CPUS, log_to_driver=False, logging_level="ERROR")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.parts:
            measured = _measure(name, arguments, arguments.home or Path(temporary))
            found[name] = {"machine": machine(), **measured}
            print(name, json.dumps(found[name]), flush=True)
            if arguments.write:
                write(found)
    ray.shutdown()
    print(json.dumps(found))


def _measure(name: str, arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    trials, epochs, users = arguments.trials, arguments.epochs, arguments.users
    if name == "overhead":
        return measure_overhead(min(trials, 6), min(epochs, 8), users)
    if name == "packing":
        return measure_packing(min(epochs, 3), users)
    return measure_gain(name.removeprefix("gain-"), trials, epochs, home)


if __name__ == "__main__":
    main()
