"""The memory that a training was planned with beside the peak that it reached, and its tokens/s,
for large item tables: in full, by negatives, by touched rows and by codes.

    python -m benchmarks.memory_plan
    python -m benchmarks.memory_plan --items 100_000 --dim 64
    python -m benchmarks.memory_plan --items 2_000_000 --dim 256 --steps 4

A few steps of `bert4rec-production` on windows of full length, each training in a process of its
own. On a CPU (Linux alone) the peak is what the process grew by, its libraries left out; on a GPU
what torch allocated at most. The heap of a CPU's process keeps blocks that are free and too small
for the next tensor, the more so the longer it trains: the part `heap` of the plan is a margin for
that, which these measurements set (`_HEAP` of `recsys.memory_plan`).

Tokens/s are of those few steps, their first one among them. Writes
`benchmarks/results/memory-plan-<items>.md`; the last line printed is one JSON object.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluation import Size, draw_store
from benchmarks.measure import machine
from benchmarks.training_gpu import make_trainer
from recsys.catalogue import NUM_SPECIAL
from recsys.memory_plan import Workload, plan_memory
from recsys.recipe import Recipe, read_recipe
from recsys.splits import leave_one_out

RESULTS = Path(__file__).parent / "results"
RECIPE = "bert4rec-production"
_SELF = Path("/proc/self")
_SAMPLED = {"kind": "sampled-softmax", "negatives": {"source": "mixed", "num": 1_024}}
KINDS: Mapping[str, dict[str, Any]] = {
    "full softmax": {},
    "sampled softmax": {"loss": _SAMPLED},
    "sampled softmax, 4 parts": {"loss": _SAMPLED},
    "touched rows": {"loss": _SAMPLED, "optimiser": {"item_rows": "touched"}},
    "item codes": {"model": {"item_codes": {"length": 8, "source": "random"}}},
}
MICRO_BATCHES = {"sampled softmax, 4 parts": 4}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    items: int
    dim: int
    batch_size: int
    steps: int = 1

    def recipe(self, kind: str) -> Recipe:
        """The recipe of a kind, in these sizes."""
        overrides = KINDS[kind]
        model = {"dim": self.dim, "num_heads": 4, **overrides.get("model", {})}
        return read_recipe(RECIPE, {**overrides, "batch_size": self.batch_size, "model": model})


def main() -> None:
    """Parses; trains each kind in turn and records what was planned and what was held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128, help="width of a vector")
    parser.add_argument("--batch_size", type=int, default=256, help="windows of 50 events")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    case = Case(arguments.items, arguments.dim, arguments.batch_size, arguments.steps)
    if arguments.only:
        print(json.dumps(measure(case, arguments.only)))
        return
    found = {}
    for kind in KINDS:
        found[kind] = run_kind(kind, case)
        print(f"{kind}: {found[kind]}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"memory-plan-{case.items}.md").write_text(render(case, found))
    print(json.dumps({**asdict(case), **found}))


def run_kind(kind: str, case: Case) -> dict[str, Any]:
    """One training in a process of its own."""
    options = [word for key, value in asdict(case).items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--only", kind, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(case: Case, kind: str) -> dict[str, Any]:
    """Planned and measured bytes of a few steps, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = case.recipe(kind)
    # What the first steps of a process load is no part of any plan.
    _train(Case(items=500, dim=case.dim, batch_size=8), kind, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        dtype, tokens_per_s = _train(case, kind, device)
        grown = torch.cuda.max_memory_allocated(device) - before
    else:
        before = _restart_high_water()
        dtype, tokens_per_s = _train(case, kind, device)
        grown = _high_water_bytes() - before
    size = _size(case)
    workload = Workload(
        num_rows=case.items + NUM_SPECIAL,
        num_tokens=size.users * size.events,
        context_sizes=(),
        dtype=dtype,
        micro_batches=MICRO_BATCHES.get(kind, 1),
        validation_users=1,
        is_cuda=device.type == "cuda",
    )
    plan = plan_memory(recipe, workload)
    return {
        "device": device.type,
        "planned_bytes": plan.total_bytes,
        "measured_bytes": grown,
        "ratio": round(plan.total_bytes / max(grown, 1), 3),
        "tokens_per_s": round(tokens_per_s),
        "parts": plan.parts,
    }


def _restart_high_water() -> int:
    """From now on the kernel keeps the largest resident size anew; what it is now, bytes. Samples
    would miss what lasts for milliseconds.
    """
    (_SELF / "clear_refs").write_text("5")
    return _high_water_bytes()


def _high_water_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", (_SELF / "status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def render(case: Case, found: Mapping[str, Mapping[str, Any]]) -> str:
    """What was found, in Markdown."""
    rows = [
        f"| {kind} | {_gib(row['planned_bytes'])} | {_gib(row['measured_bytes'])} | "
        f"{row['ratio']:.2f} | {row['tokens_per_s']:,} | "
        + ", ".join(f"{name} {_gib(size)}" for name, size in row["parts"].items())
        + " |"
        for kind, row in found.items()
    ]
    text = [
        f"# Planned and measured memory of a training, {case.items:,} items x {case.dim}",
        "",
        f"`python -m benchmarks.memory_plan --items {case.items} --dim {case.dim} "
        f"--batch_size {case.batch_size} --steps {case.steps}`: steps of `{RECIPE}`",
        f"on {case.batch_size} windows of 50 events; GiB. {machine()}; torch "
        f"{metadata.version('torch')}, threads: {torch.get_num_threads()}.",
        "",
        "`heap` is the margin for what a CPU's process keeps of freed blocks.",
        "",
        "| training | planned | measured | planned / measured | tokens/s | what was planned |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(text) + "\n"


def _train(case: Case, kind: str, device: torch.device) -> tuple[torch.dtype, float]:
    """The numbers that a training counted in, and its tokens/s."""
    recipe, store = case.recipe(kind), draw_store(_size(case))
    trainer = make_trainer(
        recipe,
        store,
        leave_one_out(store.offsets_U),
        case.items + NUM_SPECIAL,
        device,
        max_epochs=2,
        micro_batches=MICRO_BATCHES.get(kind, 1),
    )
    if recipe.model.item_codes is not None:
        # Codes take what they take, whatever they say.
        trainer.model.load_codes(trainer.model.items.state_dict()["codes"])
    return trainer.dtype, trainer.train_epoch().tokens_per_s


def _size(case: Case) -> Size:
    max_len = read_recipe(RECIPE).model.max_len
    return Size(case.steps * case.batch_size, case.items, max_len + 2)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f}"


if __name__ == "__main__":
    main()
