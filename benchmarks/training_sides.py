"""The two sides of `benchmarks.training`, each in a process of its own: our trainer, and RecTools
in an environment of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.published import Dataset, read_dataset
from benchmarks.training_cases import CASES, Case, find_case, peer_options
from recsys.evaluation import rank_targets
from recsys.interactions import training_positions
from recsys.metrics import mean_accuracy
from recsys.model import NextItemModel
from recsys.scorer import ModelScorer
from recsys.trainer import Trainer, TrainerConfig

PEER = "RecTools 0.19.0"
REQUIREMENTS = (
    "rectools[torch]==0.19.0",
    "pytorch-lightning==2.5.2",
    "numpy==1.26.4",
    "pandas==2.3.3",
    "scipy==1.17.1",
)
INSTALL_TIMEOUT_S = 1_800
TRAINING_TIMEOUT_S = 6 * 3_600
TOP_K = 20
_IS_COMPLETE = "from importlib.metadata import version; [version(n) for n in {names}]"


class PeerError(Exception):
    """The peer cannot be asked; the message says what to do."""


@dataclass(frozen=True)
class Trained:
    """What one side made of its epochs."""

    tokens: int
    """Events that an epoch fed, padding left out; one in two windows counts twice."""
    epoch_s: float
    """Median of the epochs, without validation and set-up."""
    tokens_per_s: float
    ndcg10: float
    """On the validation targets of all users, after the last epoch."""
    versions: str

    @classmethod
    def read(cls, line: str) -> "Trained":
        """From the line of JSON that a side prints."""
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Plan:
    """How both sides train."""

    epochs: int
    threads: int
    seed: int
    quick: bool = False


def train_ours(name: str, plan: Plan, precision: str) -> Trained:
    """Our trainer in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_sides", name, "--precision", precision]
    command += [f"--{key}={getattr(plan, key)}" for key in ("epochs", "threads", "seed")]
    command += ["--quick"] * plan.quick
    return Trained.read(_last_line(command, plan.threads))


def train_here(case: Case, plan: Plan, precision: str) -> Trained:
    """Our trainer in this process."""
    torch.set_num_threads(plan.threads)
    dataset = read_dataset(case.dataset)
    trainer = make_trainer(case, dataset, plan, precision)
    seconds, rates = [], []
    for _ in range(plan.epochs):
        started = time.perf_counter()
        rates.append(trainer.train_epoch().tokens_per_s)
        seconds.append(time.perf_counter() - started)
    users = validation_users(dataset)
    scorer = ModelScorer(trainer.model, dataset.context.known_at_request_F)
    ranking = rank_targets(scorer, dataset.store, users, dataset.split.validation_U[users])
    return Trained(
        round(median(rates) * median(seconds)),
        median(seconds),
        median(rates),
        mean_accuracy(ranking.ranks_N)["NDCG@10"],
        f"torch {metadata.version('torch')}, {trainer.dtype}".replace("torch.", ""),
    )


def make_trainer(
    case: Case, dataset: Dataset, plan: Plan, precision: str, *, compiled: bool = False
) -> Trainer:
    """A trainer of an untrained model; its own validation is one user, once."""
    recipe = case.read_recipe()
    torch.manual_seed(plan.seed)
    config = TrainerConfig(
        max_epochs=plan.epochs,
        validate_every=plan.epochs,
        validation_users=1,
        precision=precision,
        compile=compiled,
    )
    return Trainer(
        recipe,
        config,
        NextItemModel(recipe.model, dataset.catalogue.num_rows, dataset.context.sizes),
        dataset.store,
        dataset.split,
        dataset.context.known_at_request_F,
        seed=plan.seed,
        device=torch.device("cpu"),
    )


def train_peer(python: Path, name: str, plan: Plan) -> Trained:
    """RecTools on the same training events, its lists held against the same targets."""
    case = find_case(name, quick=plan.quick)
    dataset = read_dataset(case.dataset)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("settings.json", "events.npz", "lists.npz")]
        paths[0].write_text(json.dumps(peer_settings(case, plan)))
        write_events(dataset, paths[1])
        script = Path(__file__).with_name("training_peer.py")
        command = [str(python), "-I", "-W", "ignore", str(script), *map(str, paths)]
        found = json.loads(_last_line(command, plan.threads))
        lists_NK = np.load(paths[2])["lists"]
    users = validation_users(dataset)
    wanted_N = dataset.store.items_T[dataset.split.validation_U[users]]
    ranks_N = ranks_of(lists_NK, wanted_N, dataset.catalogue.num_rows)
    epoch_s = median(found["epoch_s"])
    return Trained(
        found["tokens"],
        epoch_s,
        found["tokens"] / epoch_s,
        mean_accuracy(ranks_N)["NDCG@10"],
        f"{found['versions']}, float32",
    )


def peer_settings(case: Case, plan: Plan) -> dict[str, Any]:
    """What `training_peer.py` reads."""
    return {
        "model": case.peer,
        "block": case.peer_block,
        "options": peer_options(case, case.read_recipe()),
        "epochs": plan.epochs,
        "threads": plan.threads,
        "seed": plan.seed,
        "k": TOP_K,
    }


def write_events(dataset: Dataset, path: Path) -> None:
    """The training events of every user in their order, as dense users and items, and the users
    that are recommended for.
    """
    store = dataset.store
    positions_T = training_positions(store, dataset.split)
    users_T = np.repeat(np.arange(store.num_users), np.diff(store.offsets_U))
    np.savez(
        path,
        users=users_T[positions_T],
        items=store.items_T[positions_T],
        targets=validation_users(dataset),
    )


def validation_users(dataset: Dataset) -> np.ndarray:
    """Every user with a validation target; what stands before it is what trained."""
    return np.flatnonzero(dataset.split.validation_U >= 0)


def ranks_of(lists_NK: np.ndarray, wanted_N: np.ndarray, num_rows: int) -> np.ndarray:
    """Where each wanted item stands in its list, int64 `[N]` from 1; `num_rows` if it does not."""
    is_wanted_NK = lists_NK == wanted_N[:, None]
    return np.where(is_wanted_NK.any(1), is_wanted_NK.argmax(1) + 1, num_rows)


def prepare_peer(folder: Path) -> Path:
    """The Python of an environment with RecTools, which is installed there unless it is complete.

    Its torch is of our version, so that both sides call the same kernels. Raises: PeerError.
    """
    python = folder / "bin" / "python"
    if _is_complete(python):
        return python
    torch_version = metadata.version("torch").partition("+")[0]
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    try:
        venv.create(folder, with_pip=True)
        subprocess.run(
            [*install, *REQUIREMENTS, f"torch=={torch_version}"],
            check=True,
            timeout=INSTALL_TIMEOUT_S,
            stderr=subprocess.PIPE,
            text=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PeerError(
            f"{PEER} could not be installed in {folder} ({_reason(error)}); name an environment "
            "that has it with --peers-env, or run --quick, which leaves the peer out."
        ) from error
    return python


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"pip took longer than {INSTALL_TIMEOUT_S} s"
    said = (getattr(error, "stderr", None) or str(error)).strip()
    return said.splitlines()[-1] if said else type(error).__name__


def _is_complete(python: Path) -> bool:
    names = ["rectools", "pytorch-lightning", "torch"]
    command = [str(python), "-I", "-c", _IS_COMPLETE.format(names=names)]
    return python.exists() and not subprocess.run(command, capture_output=True).returncode


def _last_line(command: list[str], threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=TRAINING_TIMEOUT_S,
        env=environment,
    )
    return done.stdout.splitlines()[-1]


def main() -> None:
    """Trains our side of a case and prints what came out."""
    parser = argparse.ArgumentParser(description="Our side of a case; see benchmarks.training.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--precision", required=True)
    for name in ("epochs", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    plan = Plan(arguments.epochs, arguments.threads, arguments.seed, arguments.quick)
    case = find_case(arguments.case, quick=plan.quick)
    print(json.dumps(asdict(train_here(case, plan, arguments.precision))))


if __name__ == "__main__":
    main()
