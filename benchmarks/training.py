"""The training engine: tokens a second beside RecTools, what Ray adds, loading, and the GPU.

    python -m benchmarks.training                      (all cases that this machine can measure)
    python -m benchmarks.training --case bert4rec --epochs 1
    python -m benchmarks.training --quick              (a synthetic shop, without the peer)

bert4rec, sasrec: the same architecture, width, layers, heads, length, dropout, batch, learning
rate, loss and share of masks on both sides, as many epochs, on the same training events of
MovieLens-1M (`ml-1m.txt` below NEXTITEM_DATA, leave-one-out). In sasrec RecTools is given the block
that ours has too; sasrec-own-block leaves it its own, which multiplies less. The rate is constant
on both sides; ours clips gradients. Each side is a process of its own, one after the other, with
`--threads` threads and the same torch. Ours trains in bf16 where the CPU multiplies it (`precision
= "auto"`) and, for comparison, in fp32; RecTools trains in fp32, as it comes.

A token is a training event that a side feeds, padding left out: tokens/s are the tokens of an epoch
over the seconds of that epoch, without validation and set-up (RecTools: between Lightning's
`on_train_epoch_start` and `_end`). RecTools feeds the last events of a user, one window of them;
ours feeds all, in as many windows as it takes, which overlap a little: an epoch has more tokens,
an event in two windows counts twice, and seconds are given beside the rate. NDCG@10 is of the
validation targets after the last epoch, among the whole catalogue without the items of the history;
RecTools hands over lists, and both are measured by `recsys.metrics`.

scaling: an epoch of the plain trainer and under Ray Train with 1, 2 and 4 workers of one thread.
loading: from the sequences table of a million users to the first batch. huge-pages and compile: an
epoch with and without, taking turns. gpu: see `training_gpu`.

RecTools is installed in an environment of its own, which is kept for the next time. Without an
option that changes figures, each case is written to `results/training.json` as soon as it is
measured, in place of what was there of it, and `training.md` is rendered from all. Each case prints
a line with all that it found. The last line printed is one JSON object with, for each case that is
trained beside RecTools, the keys `LAST_LINE` alone; the other cases have no peer and are not in it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.measure import machine
from benchmarks.training_cases import CASES, find_case
from benchmarks.training_compile import measure_compile
from benchmarks.training_gpu import measure_gpu
from benchmarks.training_ray import (
    HUGE,
    LOADING,
    QUICK,
    SCALING,
    measure_huge_pages,
    measure_loading,
    measure_scaling,
)
from benchmarks.training_record import render
from benchmarks.training_sides import (
    PEER,
    PeerError,
    Plan,
    Trained,
    prepare_peer,
    train_ours,
    train_peer,
)

RESULTS = Path(__file__).parent / "results"
OTHERS = ("scaling", "loading", "huge-pages", "compile", "gpu")
PRECISIONS = {"ours": "auto", "ours, fp32": "fp32"}
SIDES = ("ours", PEER, "ours, fp32")
LAST_LINE = (
    "recipe",
    "ours_tokens_per_s",
    "peer",
    "peer_tokens_per_s",
    "ratio",
    "ours_ndcg10",
    "peer_ndcg10",
)
_CHANGES_FIGURES = ("epochs", "rounds", "threads", "quick")


def main() -> None:
    """Parses; measures the cases in turn and records them."""
    parser = make_parser()
    arguments = parser.parse_args()
    is_full = all(getattr(arguments, name) == parser.get_default(name) for name in _CHANGES_FIGURES)
    found = {}
    try:
        for name, case in measure_cases(arguments):
            found[name] = {"machine": machine(), **case}
            _log(f"{name}: {json.dumps(found[name])}")
            if is_full:
                record({name: found[name]}, RESULTS)
    except PeerError as error:
        sys.exit(str(error))
    print(json.dumps(summarise(found)))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=(*CASES, *OTHERS))
    parser.add_argument("--epochs", type=_at_least_one, default=3, help="of each side of a case")
    parser.add_argument("--rounds", type=_at_least_one, default=1, help="trainings of each side")
    parser.add_argument("--threads", type=_at_least_one, default=2)
    parser.add_argument("--quick", action="store_true", help="small, and without the peer")
    parser.add_argument(
        "--peers-env", type=Path, help=f"folder of an environment for {PEER}; {_default_env()}"
    )
    return parser


def measure_cases(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of each case and what it found. Raises: PeerError before anything is trained."""
    names = arguments.case or choose_cases(quick=arguments.quick)
    python = None
    # A quick run asks the peer only where one is named.
    if set(names) & set(CASES) and (arguments.peers_env or not arguments.quick):
        _log(f"{PEER}: looking for it, or installing it")
        python = prepare_peer((arguments.peers_env or _default_env()).resolve())
    others: dict[str, Callable[[], dict[str, Any]]] = {
        "scaling": lambda: measure_scaling(QUICK if arguments.quick else SCALING),
        "loading": lambda: measure_loading(QUICK if arguments.quick else LOADING),
        "huge-pages": lambda: measure_huge_pages(QUICK if arguments.quick else HUGE),
        "compile": lambda: measure_compile(make_plan(arguments)),
        "gpu": measure_gpu,
    }
    for name in names:
        yield name, others[name]() if name in others else compare(name, arguments, python)


def choose_cases(*, quick: bool) -> tuple[str, ...]:
    """The cases of a run that names none; a quick one starts no Ray."""
    return ("bert4rec", "sasrec", "gpu") if quick else (*CASES, *OTHERS)


def compare(name: str, arguments: argparse.Namespace, python: Path | None) -> dict[str, Any]:
    """Both sides of a case, in turn, and ours in fp32; `python` is the peer's, None without it."""
    trained: dict[str, list[Trained]] = {}
    for number in range(1, arguments.rounds + 1):
        plan = make_plan(arguments, seed=number)
        for side in SIDES:
            if side in PRECISIONS:
                one = train_ours(name, plan, PRECISIONS[side])
            elif python is not None:
                one = train_peer(python, name, plan)
            else:
                continue
            trained.setdefault(side, []).append(one)
            _log(f"{name}, {side}: {one}")
    case = find_case(name, quick=arguments.quick)
    return {
        **compare_sides(case.read_recipe().name, trained),
        "peer_block": case.peer_block,
        "dataset": case.dataset,
        "epochs": arguments.epochs,
        "threads": arguments.threads,
    }


def make_plan(arguments: argparse.Namespace, seed: int = 1) -> Plan:
    """How a side trains, by the command line."""
    return Plan(arguments.epochs, arguments.threads, seed, arguments.quick)


def compare_sides(recipe: str, trained: dict[str, list[Trained]]) -> dict[str, Any]:
    """A case as the last line names it, and each side in full; the peer's figures are None where it
    did not train.
    """
    sides = {side: _average(of_side) for side, of_side in trained.items()}
    ours, peer = sides["ours"], sides.get(PEER)
    return {
        "recipe": recipe,
        "ours_tokens_per_s": round(ours.tokens_per_s),
        "peer": PEER,
        "peer_tokens_per_s": round(peer.tokens_per_s) if peer else None,
        "ratio": round(ours.tokens_per_s / peer.tokens_per_s, 2) if peer else None,
        "ours_ndcg10": round(ours.ndcg10, 4),
        "peer_ndcg10": round(peer.ndcg10, 4) if peer else None,
        "sides": {side: asdict(figures) for side, figures in sides.items()},
    }


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """The last line: what both sides of each compared case came to."""
    return {name: {key: found[name][key] for key in LAST_LINE} for name in CASES if name in found}


def record(found: dict[str, Any], results: Path) -> None:
    """Writes both files of the results; cases that were not measured stay as they are."""
    path = results / "training.json"
    known = (json.loads(path.read_text()) if path.exists() else {}) | found
    ordered = {name: known[name] for name in (*CASES, *OTHERS) if name in known}
    results.mkdir(exist_ok=True)
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    path.with_suffix(".md").write_text(render(ordered))


def _average(trained: Sequence[Trained]) -> Trained:
    """Several trainings of a side as one: medians of what they took, the mean of what they
    reached.
    """
    return Trained(
        round(median(one.tokens for one in trained)),
        median(one.epoch_s for one in trained),
        median(one.tokens_per_s for one in trained),
        mean(one.ndcg10 for one in trained),
        trained[0].versions,
    )


def _default_env() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nextitem" / PEER.replace(" ", "-").lower()


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; give 1 or more")
    return number


def _log(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
