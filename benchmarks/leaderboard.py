"""Trains the rows of the leader board on the files that papers evaluate on, and writes the table.

    python -m benchmarks.leaderboard train ml-1m-sasrec-ce --seed 1
    python -m benchmarks.leaderboard compare globo-context globo-bare --seed 1
    python -m benchmarks.leaderboard baselines ml-1m.txt
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
from benchmarks.published import DATASETS, NO_CONTEXT, Dataset, read_dataset
from recsys.attributes import AttributeEncoder, AttributesConfig
from recsys.baselines import BASELINES, EASE, make_baselines
from recsys.checkpoint import load_checkpoint, save_checkpoint
from recsys.comparison import compare
from recsys.context import NO_TIME, ContextConfig
from recsys.interactions import training_counts
from recsys.item_codes import agree_on_codes
from recsys.item_table import ItemFeatures
from recsys.leaderboard import Row, comparison_facts, hash_targets, measure
from recsys.model import NextItemModel
from recsys.recipe import read_recipe
from recsys.scorer import ModelScorer
from recsys.trainer import Trainer, TrainerConfig

RESULTS = Path(__file__).parent / "results" / "leaderboard"

_HEAD = (
    "| row | recipe | width/layers/heads/length | HR@10 | NDCG@10 | seeds | best epoch "
    "| training | published |"
)
_INTRODUCTION = """# Leader board

The whole catalogue is ranked, never a sample; items of the user's history are left out; ties count
against us; the epoch is chosen by NDCG@10 on validation targets and test is ranked once, with that
epoch's weights. Means over seeds; `±` is half of the 95 % interval that a bootstrap over the users
gives, in brackets the least and the most of the seeds. Every figure of ours comes from a training
that was run by the commands below, on CPU cores and beside other work, so minutes are an upper
bound; `leaderboard/` beside this file has each with its settings and its curve. "Published" names
HR@10 / NDCG@10 of others under their own protocols. "time-blind" is the same weights told nothing
of the request. In our copy of ml-1m's ratings.dat the times of ratings of 3 and less are
interpolated; what reads times may profit from that. No row of globo reads the gap before a click:
that log invents the time of the last click of a session, 30,000 ms after the one before, so the gap
at a request would say that its click is the last, as the targets of leave-one-out all are."""

log = logging.getLogger("leaderboard")


class Entry(BaseModel):
    """A row of the leader board."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    context: ContextConfig = NO_CONTEXT
    attributes: AttributesConfig = AttributesConfig()
    cut: tuple[float, float] | None = None
    """By time, see `published.read_dataset`; by default the last event of each user tests."""
    recipe: str
    max_epochs: int
    floor: tuple[float, float] | None = None
    aim: tuple[float, float] | None = None
    published: str = ""
    max_users: int = 30_000
    """At most so many users, a seeded sample, are validated, and as many are tested."""
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
    dataset = read_dataset(entry.dataset, entry.context, entry.cut)
    trainer = make_trainer(entry, dataset, seed)
    folder = _home() / f"{name}-{seed}"
    history = _train_to_the_end(trainer, folder)

    load_checkpoint(folder / "best", trainer)
    targets = choose_targets(dataset, entry.max_users)
    rows = measure_model(trainer.model, dataset, targets)
    np.save(folder / "ranks.npy", rows[0].ranking.ranks_N)
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
        **_facts(dataset, targets, rows),
        "history": history,
    }
    _keep(f"{name}-{seed}", found)
    return found


def make_trainer(entry: Entry, dataset: Dataset, seed: int) -> Trainer:
    """A trainer of an untrained model; every user with a target validates."""
    recipe = read_recipe(entry.recipe, entry.overrides)
    torch.manual_seed(seed)
    encoder = AttributeEncoder.learn(entry.attributes, dataset.catalogue)
    features = ItemFeatures.build(dataset.catalogue, encoder)
    num_rows, sizes = dataset.catalogue.num_rows, dataset.context.sizes
    model = NextItemModel(recipe.model, num_rows, sizes, features)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.model.item_codes is not None:
        events = dataset.store, dataset.split, dataset.catalogue
        model.load_codes(agree_on_codes(recipe.model.item_codes, *events, seed=seed, device=device))
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


def choose_targets(dataset: Dataset, max_users: int) -> np.ndarray:
    """Users whose test events are ranked, the same sample for every row of a data set."""
    users = np.flatnonzero(dataset.split.test_U >= 0)
    if len(users) <= max_users:
        return users
    return np.sort(np.random.default_rng(0).choice(users, max_users, replace=False))


def measure_model(model: NextItemModel, dataset: Dataset, users: np.ndarray) -> list[Row]:
    """The test targets under a model, and, where it reads a context, as if nothing were known of
    the request."""
    known_F = dataset.context.known_at_request_F
    scorers = [ModelScorer(model, known_F)]
    if len(known_F):
        scorers.append(ModelScorer(model, known_F, name="time-blind", knows_request=False))
    return [_measure(scorer, dataset, users) for scorer in scorers]


def compare_trainings(name: str, other: str, seed: int) -> dict[str, Any]:
    """Two rows with the same seed, paired by user. Raises: FileNotFoundError before both are
    trained, ValueError when they have other targets.
    """
    results = [json.loads((RESULTS / f"{row}-{seed}.json").read_text()) for row in (name, other)]
    if results[0]["targets_sha256"] != results[1]["targets_sha256"]:
        raise ValueError(
            f"{name} and {other} rank other test targets; compare rows of one data set."
        )
    ranks = [np.load(_home() / f"{row}-{seed}" / "ranks.npy") for row in (name, other)]
    found = {
        "row": name,
        "against": other,
        "seeds": seed,
        **{key: results[0][key] for key in ("dataset", "protocol", "targets_sha256")},
        **{
            metric: comparison_facts(compare(*ranks, metric=metric))
            for metric in ("HR@10", "NDCG@10")
        },
    }
    _keep(f"compare-{name}-{other}-{seed}", found)
    return found


def measure_baselines(
    name: str, cut: tuple[float, float] | None, max_users: int = 30_000
) -> dict[str, Any]:
    """Every baseline on the test targets of a data set; recent popularity where there are times."""
    dataset = read_dataset(name, cut=cut)
    users = choose_targets(dataset, max_users)
    is_small = dataset.catalogue.num_items <= EASE.max_items
    is_timed = (dataset.store.timestamps_T != NO_TIME).any()
    fits = {"ease": is_small, "recent-popularity": is_timed}
    names = tuple(name for name in BASELINES if fits.get(name, True))
    num_rows = dataset.catalogue.num_rows
    rows = [
        _measure(baseline.fit(dataset.store, dataset.split, num_rows), dataset, users)
        for baseline in make_baselines(names)
    ]
    found = {"baselines": name, "machine": machine(), **_facts(dataset, users, rows)}
    _keep(f"baselines-{name}{'-cut' if cut else ''}", found)
    return found


def render(found: list[dict[str, Any]]) -> str:
    """The leader board in Markdown, from what trainings and baselines found."""
    sections: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in found:
        sections.setdefault((result["dataset"], result["protocol"]), []).append(result)
    texts = [_render_section(results) for _, results in sorted(sections.items())]
    return "\n\n".join([_INTRODUCTION, *texts]) + "\n"


def _render_section(results: list[dict[str, Any]]) -> str:
    some = next(result for result in results if "test" in result)
    (sha256,) = {result["targets_sha256"] for result in results}
    facts = (
        f"{some['num_users']:,} test users, {some['num_items']:,} items. sha256 of the test pairs: "
        f"`{sha256}`."
    )
    by_row: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if "seed" in result:
            by_row.setdefault(result["row"], []).append(result)
    rows = [_HEAD, "|" + "---|" * (_HEAD.count("|") - 1)]
    for seeds in sorted(by_row.values(), key=_mean_ndcg, reverse=True):
        rows += [_row(seeds, knowing) for knowing in seeds[0]["test"]]
    commands = [f"python -m benchmarks.leaderboard train {row} --seed 1" for row in by_row]
    notes = []
    for result in results:
        if "against" in result:
            notes.append(_note(result))
            commands.append(
                f"python -m benchmarks.leaderboard compare {result['row']} {result['against']} "
                f"--seed {result['seeds']}"
            )
        elif "baselines" in result:
            tests = result["test"].items()
            rows += [f"| | {name} | | {_means([test])} | | | | |" for name, test in tests]
            cut = " --cut 0.8 0.9" if "cut" in result["protocol"] else ""
            commands.append(f"python -m benchmarks.leaderboard baselines {result['dataset']}{cut}")
    title = f"## {some['dataset']}, {some['protocol']}"
    return "\n".join([title, "", facts, "", *rows, "", *notes, "", "```sh", *commands, "```"])


def _note(result: dict[str, Any]) -> str:
    lifts = [
        f"{metric} {facts['lift']:+.1%} [{facts['lift_low']:+.1%}, {facts['lift_high']:+.1%}]"
        for metric, facts in ((metric, result[metric]) for metric in ("HR@10", "NDCG@10"))
    ]
    return f"{result['row']} against {result['against']}, paired by user: {', '.join(lifts)}."


def _row(seeds: list[dict[str, Any]], knowing: str) -> str:
    first, minutes = seeds[0], [result["seconds"] / 60 for result in seeds]
    model, entry = first["recipe"]["model"], first["entry"]
    is_told = knowing == "model"
    best = ", ".join(str(result["best_epoch"]) for result in seeds)
    cells = [
        first["row"],
        _name(first) if is_told else f"{_name(first)}; {knowing}",
        f"{model['dim']}/{model['num_layers']}/{model['num_heads']}/{model['max_len']}",
        _means([result["test"][knowing] for result in seeds]),
        str(len(seeds)),
        f"{best} of {entry['max_epochs']}",
        f"{np.mean(minutes):.0f} min, {first['threads']} thread",
        entry["published"] if is_told else "",
    ]
    return f"| {' | '.join(cells)} |"


def _name(result: dict[str, Any]) -> str:
    """The recipe and what it reads beside the items."""
    entry = Entry.model_validate(result["entry"])
    read = [*entry.context.fields, *entry.attributes.fields]
    return " with ".join([result["recipe"]["name"], *([", ".join(read)] if read else [])])


def _means(tests: list[dict[str, Any]]) -> str:
    """Means over the seeds; the interval is that of the users, averaged, and the spread that of the
    seeds."""
    cells = []
    for metric in ("HR@10", "NDCG@10"):
        means = [test[metric]["mean"] for test in tests]
        half = np.mean([(test[metric]["high"] - test[metric]["low"]) / 2 for test in tests])
        spread = f" ({min(means):.4f} to {max(means):.4f})" if len(tests) > 1 else ""
        cells.append(f"{np.mean(means):.4f} ± {half:.4f}{spread}")
    return " | ".join(cells)


def _mean_ndcg(seeds: list[dict[str, Any]]) -> float:
    return float(np.mean([result["test"]["model"]["NDCG@10"]["mean"] for result in seeds]))


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


def _measure(scorer: Any, dataset: Dataset, users: np.ndarray) -> Row:
    counts_I = training_counts(dataset.store, dataset.split, dataset.catalogue.num_rows)
    row = measure(scorer, dataset.store, users, dataset.split.test_U[users], counts_I)
    log.info("%s: HR@10 %s, NDCG@10 %s", row.name, row.accuracy["HR@10"], row.accuracy["NDCG@10"])
    return row


def _facts(dataset: Dataset, users: np.ndarray, rows: list[Row]) -> dict[str, Any]:
    targets = dataset.split.test_U[users]
    return {
        "dataset": dataset.name,
        "protocol": dataset.protocol,
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
    baselines = commands.add_parser("baselines")
    baselines.add_argument("dataset", choices=DATASETS)
    baselines.add_argument("--cut", type=float, nargs=2)
    compares = commands.add_parser("compare")
    compares.add_argument("row", choices=sorted(read_entries()))
    compares.add_argument("against", choices=sorted(read_entries()))
    compares.add_argument("--seed", type=int, default=1)
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
    elif arguments.command == "compare":
        print(json.dumps(compare_trainings(arguments.row, arguments.against, arguments.seed)))
    elif arguments.command == "baselines":
        print(json.dumps(measure_baselines(arguments.dataset, arguments.cut)["test"]))
    else:
        found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
        RESULTS.with_suffix(".md").write_text(render(found))


if __name__ == "__main__":
    main()
