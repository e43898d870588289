"""Item tables of large catalogues, in full and put together from codes (RecJPQ): bytes, memory, the
seconds that learning the codes and a spectral start take, and those from a state to the 100 best
items, on a CPU.

    python -m benchmarks.large_catalogues
    python -m benchmarks.large_catalogues --items 2_000_000 --dim 256

Five users an item have 20 events each, drawn at random, a few items often and most seldom: time and
memory depend on their number, not on what they say, and no model is trained. Each part runs in a
process of its own.

Writes `benchmarks/results/large-catalogues.md`; the last line printed is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.evaluation import Size, draw_store
from benchmarks.measure import PeakMemory, machine
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.interactions import training_counts
from recsys.item_codes import ItemCodesConfig, learn_codes
from recsys.item_start import spectral_vectors
from recsys.model import NextItemModel
from recsys.model_config import ModelConfig
from recsys.splits import whole_sequences

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results"
USERS_PER_ITEM = 5
EVENTS_PER_USER = 20
TOP_K = 100
BATCHES = (1, 32)
"""Requests that are scored together."""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    items: int
    dim: int
    length: int

    @property
    def size(self) -> Size:
        return Size(USERS_PER_ITEM * self.items, self.items, EVENTS_PER_USER)


def learn(case: Case) -> dict[str, Any]:
    """Seconds and memory of learning the codes, in this process."""
    store = draw_store(case.size)
    split = whole_sequences(store.offsets_U)
    counts_I = training_counts(store, split, case.items + NUM_SPECIAL)
    catalogue = Catalogue.build(pa.array(np.arange(case.items)), counts_I[NUM_SPECIAL:], None)
    config = ItemCodesConfig(length=case.length)
    return _watch(lambda: learn_codes(config, store, split, catalogue, seed=0))


def start(case: Case) -> dict[str, Any]:
    """Seconds and memory of the vectors of a spectral start, in this process."""
    store = draw_store(case.size)
    split, num_rows = whole_sequences(store.offsets_U), case.items + NUM_SPECIAL
    return _watch(lambda: spectral_vectors(store, split, num_rows, case.dim, seed=0, device=CPU))


def score_in_full(case: Case) -> dict[str, Any]:
    """What a table with a vector an item takes, in this process."""
    return _score(case, None)


def score_by_codes(case: Case) -> dict[str, Any]:
    """What a table of codes and centroids takes, in this process."""
    return _score(case, ItemCodesConfig(length=case.length))


PARTS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "learn": learn,
    "start": start,
    "full": score_in_full,
    "codes": score_by_codes,
}


def main() -> None:
    """Parses; runs the parts in turn and records them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128, help="width of a vector")
    parser.add_argument("--length", type=int, default=8, help="codes of an item")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case = Case(arguments.items, arguments.dim, arguments.length)
    if arguments.only:
        print(json.dumps(PARTS[arguments.only](case)))
        return
    found = {}
    for part in PARTS:
        found[part] = run_part(part, case)
        print(f"{part}: {found[part]}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "large-catalogues.md").write_text(render(case, found))
    print(json.dumps({**asdict(case), **found}))


def run_part(part: str, case: Case) -> dict[str, Any]:
    """One part in a process of its own."""
    options = [word for key, value in asdict(case).items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "benchmarks.large_catalogues", "--only", part, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def render(case: Case, found: dict[str, dict[str, Any]]) -> str:
    """What was found, in Markdown."""
    rows = [
        f"| {name} | {found[part]['table_bytes']:,} | {found[part]['peak_bytes'] / 2**30:.2f} | "
        + " | ".join(_milliseconds(found[part]["seconds"][str(batch)]) for batch in BATCHES)
        + " |"
        for name, part in (("in full", "full"), (f"{case.length} codes an item", "codes"))
    ]
    batches = " | ".join(f"{batch} at once, ms (range)" for batch in BATCHES)
    size = case.size
    prepared = (
        f"{name} {found[part]['seconds']:.0f} s, the process holding "
        f"{found[part]['held_bytes'] / 2**30:.2f} GiB before and "
        f"{found[part]['peak_bytes'] / 2**30:.2f} GiB at its peak"
        for name, part in (
            ("learning the codes takes", "learn"),
            (f"a spectral start of width {case.dim}", "start"),
        )
    )
    text = [
        f"# {case.items:,} items in full and by codes",
        "",
        f"`python -m benchmarks.large_catalogues --items {case.items} --dim {case.dim} "
        f"--length {case.length}`: from states of width {case.dim} to the {TOP_K}",
        "best of all items in fp32, the encoder left out; median of 20. Memory is the peak of the "
        "process, libraries included.",
        f"{machine()}; torch {metadata.version('torch')}, threads: {torch.get_num_threads()}.",
        "",
        f"| item table | bytes | peak memory, GiB | {batches} |",
        "|---|---|---|" + "---|" * len(BATCHES),
        *rows,
        "",
        f"From {size.users * size.events:,} events of {size.users:,} users:",
        f"{'; '.join(prepared)}.",
    ]
    return "\n".join(text) + "\n"


def _watch(prepare: Callable[[], object]) -> dict[str, Any]:
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        started = time.perf_counter()
        prepare()
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "held_bytes": before.peak_bytes,
        "peak_bytes": memory.peak_bytes,
    }


def _score(case: Case, codes: ItemCodesConfig | None) -> dict[str, Any]:
    torch.manual_seed(0)
    config = ModelConfig(dim=case.dim, num_layers=1, item_codes=codes)
    with PeakMemory() as memory:
        model = NextItemModel(config, case.items + NUM_SPECIAL, ()).eval()
        seconds = {batch: _time(model, torch.randn(batch, case.dim)) for batch in BATCHES}
    table_bytes = sum(tensor.nbytes for tensor in model.items.state_dict().values())
    return {"table_bytes": table_bytes, "peak_bytes": memory.peak_bytes, "seconds": seconds}


@torch.no_grad()
def _time(model: NextItemModel, hidden_BD: torch.Tensor, repeats: int = 20) -> dict[str, float]:
    """Seconds of the repeats, after one that does not count."""
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        model.scores(hidden_BD).topk(TOP_K)
        seconds.append(time.perf_counter() - started)
    seconds = seconds[1:]
    return {"median": median(seconds), "least": min(seconds), "most": max(seconds)}


def _milliseconds(seconds: dict[str, float]) -> str:
    middle, least, most = (1e3 * seconds[name] for name in ("median", "least", "most"))
    return f"{middle:.1f} ({least:.1f} to {most:.1f})"


if __name__ == "__main__":
    main()
