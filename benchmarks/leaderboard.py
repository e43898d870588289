"""Trains the rows of the leader board on the files that papers evaluate on, and writes the table.

    python -m benchmarks.leaderboard train ml-1m-sasrec-ce --seed 1
    python -m benchmarks.leaderboard measure ml-1m-sasrec-ce --seed 1
    python -m benchmarks.leaderboard compare globo-context globo-bare --seed 1
    python -m benchmarks.leaderboard baselines ml-1m.txt
    python -m benchmarks.leaderboard table

Rows stand in `leaderboard.toml`. The epoch is chosen by NDCG@10 on the validation targets of all
users, and the test targets are ranked once, with that epoch's weights. A training that was killed
goes on from its last epoch when it is started again. What a training found is kept as
`results/leaderboard/<row>-<seed>.json`; `results/leaderboard.md` is rendered from these alone.
Ranks stay below `$NEXTITEM_HOME`; where those of a row and of its baselines are there, `table`
measures the row's lift over each of them, too, and what the row gains by being told of the request.
`measure` ranks with the weights of a training that is there, and adds what its result lacks.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks import leaderboard_files
from benchmarks.leaderboard_baselines import measure_baselines
from benchmarks.leaderboard_cells import METRICS
from benchmarks.leaderboard_files import home, keep, read_results, save_ranks
from benchmarks.leaderboard_measures import facts_of, measure_model
from benchmarks.leaderboard_pairs import compare_trainings, measure_lifts, measure_requests
from benchmarks.leaderboard_rows import Entry, read_entries
from benchmarks.leaderboard_table import render
from benchmarks.measure import machine
from benchmarks.published import DATASETS, Dataset, read_dataset
from ray_jobs.code_version import code_version
from recsys.attributes import AttributeEncoder
from recsys.checkpoint import load_checkpoint, save_checkpoint
from recsys.item_start import prepare_items
from recsys.item_table import ItemFeatures
from recsys.model import NextItemModel
from recsys.recipe import read_recipe
from recsys.splits import CutTarget
from recsys.trainer import Trainer, TrainerConfig
from recsys.validation import sample_users

log = logging.getLogger("leaderboard")


def train(name: str, seed: int, threads: int) -> dict[str, Any]:
    """Trains a row with one seed, ranks its test targets, and keeps what was found."""
    torch.set_num_threads(threads)
    code = code_version()
    entry = read_entries()[name]
    dataset = read_dataset(entry.dataset, entry.context, entry.cut, entry.cut_target)
    trainer = make_trainer(entry, dataset, seed)
    folder = home() / f"{name}-{seed}"
    history = _train_to_the_end(trainer, folder)

    load_checkpoint(folder / "best", trainer)
    targets = sample_users(dataset.split.test_U, entry.max_users, seed=0)
    rows = measure_model(trainer.model, dataset, targets)
    save_ranks(folder, rows)
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
        "precision": str(trainer.dtype).removeprefix("torch."),
        "machine": machine(),
        "code_version": code,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "validation": {"HR@10": best["hr10"], "NDCG@10": best["ndcg10"]},
        **facts_of(dataset, targets, rows),
        "history": history,
    }
    keep(f"{name}-{seed}", found)
    return found


def measure_again(name: str, seed: int) -> dict[str, Any]:
    """Ranks with the best weights of a training that is on this machine and adds to its result what
    is known of its lists and kinds of targets; of the training nothing changes.

    Raises: FileNotFoundError without its result or checkpoint, CheckpointError when that is not
    whole, ValueError when the ranking is not the one that was recorded.
    """
    folder = home() / f"{name}-{seed}"
    kept = leaderboard_files.RESULTS / f"{name}-{seed}.json"
    for needed in (kept, folder / "best"):
        if not needed.exists():
            raise FileNotFoundError(f"There is no {needed}; train {name} with seed {seed} first.")
    code = code_version()
    recorded = json.loads(kept.read_text())
    torch.set_num_threads(recorded["threads"])
    entry = Entry.model_validate(recorded["entry"])
    dataset = read_dataset(entry.dataset, entry.context, entry.cut, entry.cut_target)
    trainer = make_trainer(entry, dataset, seed)
    load_checkpoint(folder / "best", trainer)

    targets = sample_users(dataset.split.test_U, entry.max_users, seed=0)
    rows = measure_model(trainer.model, dataset, targets)
    facts = facts_of(dataset, targets, rows)
    _refuse_another_ranking(recorded, facts)
    save_ranks(folder, rows)
    added = {key: facts[key] for key in ("lists", "kinds")}
    found: dict[str, Any] = recorded | added | {"measured_by": code}
    keep(f"{name}-{seed}", found)
    return found


def _refuse_another_ranking(recorded: dict[str, Any], facts: dict[str, Any]) -> None:
    row = f"{recorded['row']} with seed {recorded['seed']}"
    if facts["targets_sha256"] != recorded["targets_sha256"]:
        raise ValueError(f"The test targets of {row} are not those that were recorded.")
    for name, test in recorded["test"].items():
        for metric in METRICS:
            now, before = (one[metric]["mean"] for one in (facts["test"][name], test))
            if not math.isclose(now, before, rel_tol=1e-6):
                raise ValueError(
                    f"{metric} of {row} ({name}) is {now:.6f} now and was recorded as "
                    f"{before:.6f}; the checkpoint or the code is another, so train it again."
                )


def make_trainer(entry: Entry, dataset: Dataset, seed: int) -> Trainer:
    """A trainer of an untrained model; every user with a target validates."""
    recipe = read_recipe(entry.recipe, entry.overrides)
    torch.manual_seed(seed)
    encoder = AttributeEncoder.learn(entry.attributes, dataset.catalogue)
    features = ItemFeatures.build(dataset.catalogue, encoder)
    num_rows, sizes = dataset.catalogue.num_rows, dataset.context.sizes
    model = NextItemModel(recipe.model, num_rows, sizes, features)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    events = dataset.store, dataset.split, dataset.catalogue
    prepare_items(model, recipe, *events, seed=seed, device=device)
    config = TrainerConfig(
        max_epochs=entry.max_epochs, patience=entry.patience, validation_users=entry.max_users
    )
    return Trainer(
        recipe,
        config,
        model,
        dataset.store,
        dataset.split,
        dataset.context.known_at_request_F,
        seed=seed,
        device=device,
    )


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


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    trains = commands.add_parser("train")
    trains.add_argument("row", choices=sorted(read_entries()))
    trains.add_argument("--seed", type=int, default=1)
    trains.add_argument("--threads", type=int, default=torch.get_num_threads())
    baselines = commands.add_parser("baselines")
    baselines.add_argument("dataset", choices=DATASETS)
    baselines.add_argument("--cut", type=float, nargs=2)
    baselines.add_argument("--cut_target", choices=get_args(CutTarget), default="first")
    baselines.add_argument("--untuned", action="store_true", help="with their default settings")
    compares = commands.add_parser("compare")
    compares.add_argument("row", choices=sorted(read_entries()))
    compares.add_argument("against", choices=sorted(read_entries()))
    compares.add_argument("--seed", type=int, default=1)
    measures = commands.add_parser("measure")
    measures.add_argument("row", choices=sorted(read_entries()))
    measures.add_argument("--seed", type=int, default=1)
    commands.add_parser("table")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.command == "train":
        found = train(arguments.row, arguments.seed, arguments.threads)
        shown = ("row", "seed", "best_epoch", "targets_sha256", "validation", "test")
        print(json.dumps({key: found[key] for key in shown}))
    elif arguments.command == "measure":
        found = measure_again(arguments.row, arguments.seed)
        print(json.dumps({key: found[key] for key in ("row", "seed", "test", "lists")}))
    elif arguments.command == "compare":
        print(json.dumps(compare_trainings(arguments.row, arguments.against, arguments.seed)))
    elif arguments.command == "baselines":
        protocol = arguments.cut, arguments.cut_target
        found = measure_baselines(arguments.dataset, *protocol, is_tuned=not arguments.untuned)
        print(json.dumps({key: found[key] for key in ("settings", "test")}))
    else:
        measure_lifts()
        measure_requests()
        text = render(read_results(), read_entries())
        leaderboard_files.RESULTS.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
