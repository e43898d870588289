"""Exact top-k of a large catalogue: milliseconds from states to the best items, and memory, for a
table of vectors in fp32, fp16 and bf16 and for one made of codes (RecJPQ).

    python -m benchmarks.retrieval
    python -m benchmarks.retrieval --items 200_000 --repeats 5
    python -m benchmarks.retrieval --device cuda

Each request leaves out 50 items, as its history, and takes the 100 best. The same is done by torch
(all products, then `topk`) in the same process, turn by turn, as what it is held against: on a
machine that is busy the ratio says more than the milliseconds. The encoder is left out; each table
has a process of its own.

A full run (2 million items, 256 numbers, 8 codes) writes `benchmarks/results/retrieval.md` and
`.json`, or `retrieval-cuda.*`; the last line printed is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import PeakMemory, machine
from recsys.catalogue import NUM_SPECIAL
from recsys.item_codes import ItemCodesConfig
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.retrieval import Retriever, Wish, make_retriever, round_tables

RESULTS = Path(__file__).parent / "results"
TABLES = ("codes", "fp32", "fp16", "bf16")
BATCHES = (1, 8, 32)
"""Requests that are answered together."""
TOP_K = 100
HISTORY = 50


@dataclass(frozen=True)
class Case:
    """What is measured."""

    items: int = 2_000_000
    dim: int = 256
    length: int = 8
    threads: int = 2
    repeats: int = 30
    device: str = "cpu"


FULL = Case()


def main() -> None:
    """Parses; measures each table in turn and records a full run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in asdict(FULL).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--only", choices=TABLES, help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    only, case = arguments.pop("only"), Case(**arguments)
    if only:
        print(json.dumps(measure_table(case, only)))
        return
    found = {}
    for table in TABLES:
        found[table] = run_table(case, table)
        print(f"{table}: {found[table]}", flush=True)
    record = {**asdict(case), "machine": machine(), "tables": found}
    if is_full(case):
        write_record(case, record)
    print(json.dumps(record))


def is_full(case: Case) -> bool:
    """Whether the figures are those that are kept."""
    sizes = ("items", "dim", "length")
    return all(getattr(case, name) == getattr(FULL, name) for name in sizes)


def run_table(case: Case, table: str) -> dict[str, Any]:
    """One table in a process of its own."""
    options = [word for key, value in asdict(case).items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "benchmarks.retrieval", "--only", table, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@torch.no_grad()
def measure_table(case: Case, table: str) -> dict[str, Any]:
    """Memory and times of one table, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    codes = ItemCodesConfig(length=case.length) if table == "codes" else None
    config = ModelConfig(dim=case.dim, num_layers=1, item_codes=codes)
    model = NextItemModel(config, case.items + NUM_SPECIAL, ()).eval()
    if table != "codes":
        round_tables(model, table)  # type: ignore[arg-type]
    model.to(case.device)
    retriever = make_retriever(model, case.threads)
    with PeakMemory() as memory:
        for batch in BATCHES:
            retriever.by_product(*draw_requests(case, batch, seed=batch))
    return {
        "table_bytes": sum(tensor.nbytes for tensor in model.items.state_dict().values()),
        "peak_bytes": _device_peak(case) or memory.peak_bytes,
        "batches": {
            batch: time_batch(case, model, retriever, batch, is_compared=table in ("codes", "fp32"))
            for batch in BATCHES
        },
    }


def draw_requests(case: Case, batch: int, seed: int) -> tuple[torch.Tensor, list[Wish]]:
    """Random states, and what their lists may hold."""
    rng = np.random.default_rng(seed)
    states_BD = torch.from_numpy(rng.standard_normal((batch, case.dim), np.float32))
    histories = rng.integers(NUM_SPECIAL, case.items, (batch, HISTORY))
    return states_BD.to(case.device), [Wish(TOP_K, hidden) for hidden in histories]


def time_batch(
    case: Case, model: NextItemModel, retriever: Retriever, batch: int, *, is_compared: bool
) -> dict[str, float | None]:
    """Milliseconds of a batch; torch's turns lie between ours."""
    ours, torchs = [], []
    for repeat in range(1 + case.repeats):
        states_BD, wishes = draw_requests(case, batch, seed=repeat)
        started = time.perf_counter()
        retriever.by_product(states_BD, wishes)
        ours.append(time.perf_counter() - started)
        # Torch takes up to a hundred times as long: a few turns are enough.
        if is_compared and repeat <= 5:
            started = time.perf_counter()
            model.scores(states_BD).topk(TOP_K).values.cpu()
            torchs.append(time.perf_counter() - started)
    p50_ms, p99_ms = (1e3 * float(value) for value in np.quantile(ours[1:], (0.5, 0.99)))
    torch_ms = 1e3 * float(np.median(torchs[1:])) if torchs else None
    return {
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "torch_p50_ms": torch_ms,
        "torch_over_ours": torch_ms / p50_ms if torch_ms else None,
    }


def write_record(case: Case, record: dict[str, Any]) -> None:
    """Writes the table and the figures."""
    RESULTS.mkdir(exist_ok=True)
    name = "retrieval" if case.device == "cpu" else f"retrieval-{case.device}"
    (RESULTS / f"{name}.md").write_text(render(case, record))
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def render(case: Case, record: dict[str, Any]) -> str:
    """What was found, in Markdown."""
    names = {"codes": f"{case.length} codes an item"} | {
        kind: f"vectors in {kind}" for kind in ("fp32", "fp16", "bf16")
    }
    rows = [
        f"| {names[table]} | {found['table_bytes'] / 2**20:,.0f} | "
        f"{found['peak_bytes'] / 2**30:.2f} | "
        + " | ".join(_cell(found["batches"][str(batch)]) for batch in BATCHES)
        + " |"
        for table, found in record["tables"].items()
    ]
    batches = " | ".join(f"{batch} at once, p50 / p99 ms" for batch in BATCHES)
    text = [
        f"# The {TOP_K} best of {case.items:,} items",
        "",
        f"`python -m benchmarks.retrieval --threads {case.threads} --device {case.device}`: from "
        f"states of width {case.dim} to lists, {HISTORY} items",
        f"left out of each, exact; {case.repeats} repeats. In brackets: how many times as long "
        "torch takes (products, then `topk`)",
        "in the same process. Memory is the peak while it searches, libraries included, or that of "
        "the device.",
        f"{record['machine']}; torch {metadata.version('torch')}, numba "
        f"{metadata.version('numba')}.",
        "",
        f"| item table | MiB | peak memory, GiB | {batches} |",
        "|---|---|---|" + "---|" * len(BATCHES),
        *rows,
    ]
    return "\n".join(text) + "\n"


def _cell(found: dict[str, float | None]) -> str:
    ratio = found["torch_over_ours"]
    compared = f" ({ratio:.1f} x)" if ratio else ""
    return f"{found['p50_ms']:.1f} / {found['p99_ms']:.1f}{compared}"


def _device_peak(case: Case) -> int:
    return torch.cuda.max_memory_allocated() if case.device == "cuda" else 0


if __name__ == "__main__":
    main()
