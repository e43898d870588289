"""Trains the rows of the leader board on the files that papers evaluate on, and writes the table.

    python -m benchmarks.leaderboard train ml-1m-sasrec-ce --seed 1
    python -m benchmarks.leaderboard baselines ml-1m
    python -m benchmarks.leaderboard table

Rows stand in `leaderboard.toml`. The epoch is chosen by NDCG@10 on the validation targets of all
users, and the test targets are ranked once, with that epoch's weights. A training that was killed
goes on from its last epoch when it is started again. What a training found is kept as
`results/leaderboard/<row>-<seed>.json`; `results/leaderboard.md` is rendered from these alone.
"""

import argparse
import json
import logging
import os
import time
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from benchmarks.measure import machine
from benchmarks.published import Dataset, read_dataset
from recsys.baselines import BASELINES, EASE, make_baselines
from recsys.interactions import training_counts
from recsys.leaderboard import Row, hash_targets, measure
from recsys.model import NextItemModel
from recsys.recipe import read_recipe
from recsys.scorer import ModelScorer
from recsys.trainer import Trainer, TrainerConfig, load_checkpoint, save_checkpoint

RESULTS = Path(__file__).parent / "results" / "leaderboard"

log = logging.getLogger("leaderboard")


class Entry(BaseModel):
    """A row of the leader board."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    recipe: str
    max_epochs: int
    floor: tuple[float, float] | None = None
    aim: tuple[float, float] | None = None
    published: str = ""
    overrides: dict[str, Any] = {}
    patience: int = 1_000
    """Validations without gain before training ends; by default the schedule is run to its end."""


def read_entries() -> dict[str, Entry]:
    """The rows by name."""
    content = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {name: Entry.model_validate(row) for name, row in content.items()}


def train(name: str, seed: int, threads: int) -> dict[str, Any]:
    """Trains a row with one seed, ranks its test targets, and keeps what was found."""
    torch.set_num_threads(threads)
    entry = read_entries()[name]
    dataset = read_dataset(entry.dataset)
    trainer = make_trainer(entry, dataset, seed)
    folder = _home() / f"{name}-{seed}"
    history = _train_to_the_end(trainer, folder)

    load_checkpoint(folder / "best", trainer)
    rows = measure_model(trainer.model, dataset)
    best = history[trainer.best_epoch - 1]
    found = {
        "row": name,
        "seed": seed,
        "entry": entry.model_dump(mode="json"),
        "recipe": trainer.recipe.model_dump(mode="json"),
        "best_epoch": trainer.best_epoch,
        "epochs": len(history),
        "seconds": round(sum(epoch["seconds"] for epoch in history)),
        "threads": threads,
        "machine": machine(),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "validation": {"HR@10": best["hr10"], "NDCG@10": best["ndcg10"]},
        **_facts(dataset, rows),
        "history": history,
    }
    _keep(f"{name}-{seed}", found)
    return found


def make_trainer(entry: Entry, dataset: Dataset, seed: int) -> Trainer:
    """A trainer of an untrained model; every user with a target validates."""
    recipe = read_recipe(entry.recipe, entry.overrides)
    torch.manual_seed(seed)
    model = NextItemModel(recipe.model, dataset.catalogue.num_rows, dataset.context.sizes)
    config = TrainerConfig(
        max_epochs=entry.max_epochs, patience=entry.patience, validation_users=10**9
    )
    return Trainer(
        recipe,
        config,
        model,
        dataset.store,
        dataset.split,
        dataset.context.known_at_request_F,
        seed=seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def measure_model(model: NextItemModel, dataset: Dataset) -> list[Row]:
    """The test targets under a model, and, where it reads a context, as if nothing were known of
    the request."""
    known_F = dataset.context.known_at_request_F
    scorers = [ModelScorer(model, known_F)]
    if len(known_F):
        scorers.append(ModelScorer(model, known_F, name="time-blind", knows_request=False))
    return [_measure(scorer, dataset) for scorer in scorers]


def measure_baselines(name: str) -> dict[str, Any]:
    """Every baseline on the test targets of a data set."""
    dataset = read_dataset(name)
    is_small = dataset.catalogue.num_items <= EASE.max_items
    names = tuple(name for name in BASELINES if name != "ease" or is_small)
    num_rows = dataset.catalogue.num_rows
    rows = [
        _measure(baseline.fit(dataset.store, dataset.split, num_rows), dataset)
        for baseline in make_baselines(names)
    ]
    found = {"row": name, "machine": machine(), **_facts(dataset, rows)}
    _keep(f"baselines-{name}", found)
    return found


def _train_to_the_end(trainer: Trainer, folder: Path) -> list[dict[str, Any]]:
    history_file = folder / "history.json"
    history: list[dict[str, Any]] = []
    if history_file.exists():
        load_checkpoint(folder / "last", trainer)
        history = json.loads(history_file.read_text())[: trainer.epoch]
    for kind in ("last", "best"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    while not trainer.should_stop:
        started = time.perf_counter()
        report = trainer.train_epoch()
        history.append(report.metrics() | {"seconds": time.perf_counter() - started})
        if trainer.best_epoch == trainer.epoch:
            save_checkpoint(folder / "best", trainer)
        save_checkpoint(folder / "last", trainer)
        history_file.write_text(json.dumps(history))
        log.info(
            "epoch %d: loss %.4f, NDCG@10 %.4f, HR@10 %.4f, %.0f tokens/s",
            report.epoch,
            report.loss,
            report.ndcg10,
            report.hr10,
            report.tokens_per_s,
        )
    return history


def _measure(scorer: Any, dataset: Dataset) -> Row:
    users = np.flatnonzero(dataset.split.test_U >= 0)
    counts_I = training_counts(dataset.store, dataset.split, dataset.catalogue.num_rows)
    row = measure(scorer, dataset.store, users, dataset.split.test_U[users], counts_I)
    log.info("%s: HR@10 %s, NDCG@10 %s", row.name, row.accuracy["HR@10"], row.accuracy["NDCG@10"])
    return row


def _facts(dataset: Dataset, rows: list[Row]) -> dict[str, Any]:
    users = np.flatnonzero(dataset.split.test_U >= 0)
    targets = dataset.split.test_U[users]
    return {
        "num_users": len(users),
        "num_items": dataset.catalogue.num_items,
        "targets_sha256": hash_targets(dataset.store, users, targets, dataset.catalogue),
        "test": {
            row.name: {name: asdict(interval) for name, interval in row.accuracy.items()}
            for row in rows
        },
    }


def _keep(name: str, found: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def _home() -> Path:
    return Path(os.environ.get("NEXTITEM_HOME", Path.home() / "nextitem")) / "leaderboard"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    trains = commands.add_parser("train")
    trains.add_argument("row", choices=sorted(read_entries()))
    trains.add_argument("--seed", type=int, default=1)
    trains.add_argument("--threads", type=int, default=torch.get_num_threads())
    commands.add_parser("baselines").add_argument("dataset")
    commands.add_parser("table")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.command == "train":
        found = train(arguments.row, arguments.seed, arguments.threads)
        print(
            json.dumps(
                {key: found[key] for key in ("row", "seed", "best_epoch", "validation", "test")}
            )
        )
    elif arguments.command == "baselines":
        print(json.dumps(measure_baselines(arguments.dataset)["test"]))


if __name__ == "__main__":
    main()
