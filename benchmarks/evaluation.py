"""Ranking the whole catalogue: seconds and memory at the size of MovieLens-1M and at 2 M items.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --cases model-2M popularity-2M --repeats 1

Events are drawn at random, a few items often and most seldom; the models have random weights.
Fitting a baseline is not counted; ranking is, with seen items left
out, and so are all metrics with their intervals. A case runs in a process of its own.

Writes `benchmarks/results/evaluation.md`; the last line printed is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch

from benchmarks.measure import PeakMemory, machine
from recsys.baselines import Covisitation, ItemKNN, Popularity
from recsys.catalogue import NUM_SPECIAL
from recsys.evaluation import Scorer, block_size
from recsys.interactions import training_counts
from recsys.leaderboard import measure
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.scorer import ModelScorer
from recsys.splits import Split, leave_one_out
from recsys.tokens import TokenStore

RESULTS = Path(__file__).parent / "results"
BASELINES = {"popularity": Popularity, "covisitation": Covisitation, "item-knn": ItemKNN}
MODELS = {
    "model": ModelConfig(dim=64, num_layers=2, num_heads=2, max_len=50),
    "production": ModelConfig(dim=256, num_layers=4, num_heads=8, max_len=50),
}


@dataclass(frozen=True)
class Size:
    """Users, items and events of a user."""

    users: int
    items: int
    events: int


SIZES = {"ml-1m": Size(6_040, 3_416, 165), "2M": Size(2_000, 2_000_000, 50)}
CASES = {
    f"{scorer}-{size}": (scorer, SIZES[size])
    for size in SIZES
    for scorer in (*MODELS, *BASELINES)
    if (scorer, size) != ("item-knn", "2M")
}


@dataclass(frozen=True)
class Run:
    """What one run of one case took."""

    seconds: float
    held_bytes: int
    """By the process, before it ranked: libraries, events, weights."""
    peak_bytes: int


def main() -> None:
    """Parses; runs the cases in turn and records them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case, in turn")
    parser.add_argument("--only", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(asdict(rank_case(*CASES[arguments.only]))))
        return
    runs: dict[str, list[Run]] = {case: [] for case in arguments.cases}
    for _ in range(arguments.repeats):
        for case in arguments.cases:
            runs[case].append(run_case(case))
            print(f"{case}: {runs[case][-1]}", flush=True)
    _record(runs)
    print(
        json.dumps({case: median(run.seconds for run in of_case) for case, of_case in runs.items()})
    )


def run_case(case: str) -> Run:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--only", case]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def rank_case(scorer_name: str, size: Size) -> Run:
    """Ranks the last event of every user, in this process."""
    store = draw_store(size)
    split = leave_one_out(store.offsets_U)
    num_rows = size.items + NUM_SPECIAL
    scorer = make_scorer(scorer_name, store, split, num_rows)
    counts_I = training_counts(store, split, num_rows)
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        started = time.perf_counter()
        measure(scorer, store, np.arange(size.users), split.test_U, counts_I)
        seconds = time.perf_counter() - started
    return Run(seconds, before.peak_bytes, memory.peak_bytes)


def make_scorer(name: str, store: TokenStore, split: Split, num_rows: int) -> Scorer:
    """An untrained model, or a fitted baseline."""
    if name in MODELS:
        torch.manual_seed(0)
        return ModelScorer(NextItemModel(MODELS[name], num_rows, ()), np.zeros(0, bool))
    return BASELINES[name]().fit(store, split, num_rows)


def draw_store(size: Size) -> TokenStore:
    """Seeded events without context, one a day."""
    rng = np.random.default_rng(7)
    num_events = size.users * size.events
    # Cubed, so that a few items are in most histories and most are in few.
    items_T = NUM_SPECIAL + (size.items * rng.random(num_events) ** 3).astype(np.int32)
    return TokenStore(
        pa.array(np.arange(size.users)),
        np.arange(0, num_events + 1, size.events),
        items_T,
        np.zeros((num_events, 0), np.uint8),
        np.arange(num_events) % size.events * 86_400_000_000,
    )


def _record(runs: dict[str, list[Run]]) -> None:
    rows = []
    for case, of_case in runs.items():
        name, size = CASES[case]
        seconds = [run.seconds for run in of_case]
        held, peak = (
            max(getattr(run, which) for run in of_case) / 2**30
            for which in ("held_bytes", "peak_bytes")
        )
        rows.append(
            f"| {name} | {size.users:,} | {size.items:,} | {block_size(size.items + NUM_SPECIAL)} "
            f"| {median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} "
            f"| {size.users / median(seconds):,.0f} | {held:.2f} | {peak:.2f} |"
        )
    text = [
        "# Ranking the whole catalogue",
        "",
        "`python -m benchmarks.evaluation`: models with random weights (width / layers / heads / "
        f"length: {_sizes()}), and",
        "baselines; all metrics with their intervals are counted, fitting is not. Memory is that "
        "of the process: before it",
        "ranks (libraries, events, weights), and the peak while it does.",
        f"{machine()}; torch {metadata.version('torch')}, threads: {torch.get_num_threads()}.",
        "",
        "| scorer | users | items | users a block | wall, s (median) | range | users/s "
        "| before, GiB | peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evaluation.md").write_text("\n".join(text) + "\n")


def _sizes() -> str:
    return ", ".join(
        f"{name} {model.dim} / {model.num_layers} / {model.num_heads} / {model.max_len}"
        for name, model in MODELS.items()
    )


if __name__ == "__main__":
    main()
