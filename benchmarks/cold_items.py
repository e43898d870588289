"""Items that nobody has touched yet: what a model makes of their attributes, and what that costs
the others.

    python -m benchmarks.cold_items                      (the synthetic shop alone)
    python -m benchmarks.cold_items --data beauty shop   (beauty: below NEXTITEM_DATA)

beauty: a tenth of the items, chosen at random, is cold; no event on them trains or validates. A
user whose last event is on one of them tests what is cold, everybody else what is warm, each with
the warm events before. shop: a synthetic shop cut by the clock, where what is cold opened after the
cut. Writes `benchmarks/results/cold-items.md`; the last line printed is one JSON object.

With `--develop` a second tenth of beauty takes the place of the first, which is then left out
altogether: settings are chosen there.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy import sparse
from torch import Tensor

from benchmarks.measure import machine
from data_lake.synthetic import ShopConfig, build_shop, items_table
from data_lake.synthetic_events import generate_part
from recsys.attributes import NO_ATTRIBUTES, AttributeEncoder, AttributesConfig
from recsys.baselines import Popularity
from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.covisitation import DECAY, RECENT_EVENTS
from recsys.evaluation import Scorer, rank_targets
from recsys.interactions import event_matrix, training_counts
from recsys.item_table import ItemFeatures
from recsys.metrics import accuracy_intervals
from recsys.model import NextItemModel
from recsys.recipe import Recipe, read_recipe
from recsys.scorer import ModelScorer
from recsys.splits import Split, leave_one_out, temporal_cut
from recsys.tokens import TokenStore
from recsys.trainer import Trainer, TrainerConfig

RESULTS = Path(__file__).parent / "results"
DAY_US = 86_400_000_000
NO_CONTEXT = ContextEncoder.learn(ContextConfig(categorical=(), time=()), {})
SHOP = ShopConfig(num_users=5_000, num_items=2_000, num_parts=1, new_item_share=0.3)
VALIDATION_DAY, TEST_DAY = 65, 72


@dataclass(frozen=True)
class Targets:
    """Events to rank: users and their positions."""

    users_N: np.ndarray
    targets_N: np.ndarray


@dataclass(frozen=True)
class Task:
    """A data set with its cold items."""

    name: str
    catalogue: Catalogue
    attributes: AttributesConfig
    store: TokenStore
    split: Split
    cold: np.ndarray
    """Items without a training event that are asked for."""
    cold_targets: Targets
    warm_targets: Targets
    max_epochs: int


class Among:
    """A scorer that recommends nothing but `items`."""

    def __init__(self, scorer: Scorer, items: np.ndarray) -> None:
        self.name = scorer.name
        self._scorer = scorer
        self._items = torch.from_numpy(items)

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        scores_BI = self._scorer.score(store, users_B, targets_B)
        chosen_BI = torch.full_like(scores_BI, float("-inf"))
        chosen_BI[:, self._items] = scores_BI[:, self._items]
        return chosen_BI


class AttributePopularity:
    """Training events of an item's attribute values, summed over them or their mean."""

    def __init__(self, task: Task, combine: str) -> None:
        self.name = f"popularity of attributes, {combine}"
        codes = AttributeEncoder.learn(task.attributes, task.catalogue).encode(task.catalogue)
        lengths_I = np.diff(codes.offsets_I)
        items = np.repeat(np.arange(len(lengths_I)), lengths_I)
        counts = np.bincount(codes.codes, task.catalogue.counts_I[items], codes.num_codes)
        scores_I = np.bincount(items, counts[codes.codes], len(lengths_I))
        if combine == "mean":
            scores_I /= np.maximum(lengths_I, 1)
        self._scores_I = torch.from_numpy(scores_I).float()
        self._scores_I[lengths_I == 0] = float("-inf")

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        return self._scores_I.repeat(len(users_B), 1)


class AttributeProfile:
    """Cosine between an item's attributes, rare ones counting more (TF-IDF), and the sum of those
    of the user's last events, with the decay of co-visitation.
    """

    name = "profile of attributes"

    def __init__(self, task: Task) -> None:
        codes = AttributeEncoder.learn(task.attributes, task.catalogue).encode(task.catalogue)
        shape = (task.catalogue.num_rows, codes.num_codes)
        ones = np.ones(len(codes.codes), np.float32)
        has_IC = sparse.csr_array((ones, codes.codes, codes.offsets_I), shape=shape)
        rarity_C = np.log(task.catalogue.num_items / np.maximum(has_IC.sum(0), 1))
        weights_IC = has_IC * rarity_C
        norms_I = np.sqrt((weights_IC * weights_IC).sum(1))
        self._profiles_IC = sparse.csr_array(weights_IC / np.maximum(norms_I, 1e-12)[:, None])

    def score(self, store: TokenStore, users_B: np.ndarray, targets_B: np.ndarray) -> Tensor:
        starts_B = np.maximum(store.offsets_U[users_B], targets_B - RECENT_EVENTS)
        num_rows = self._profiles_IC.shape[0]
        recent_BI = event_matrix(store, starts_B, targets_B, num_rows, decay=DECAY)
        scores_BI = (recent_BI @ self._profiles_IC @ self._profiles_IC.T).toarray()
        scores_BI[:, :NUM_SPECIAL] = -np.inf
        return torch.from_numpy(scores_BI).float()


def main() -> None:
    """Parses, trains, ranks, records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["shop"], choices=TASKS)
    parser.add_argument("--minutes", type=float, default=10, help="at most, for each training")
    parser.add_argument("--develop", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    texts, summary = [], {}
    for name in arguments.data:
        task = TASKS[name](arguments.develop)
        rows = measure(task, arguments.minutes)
        texts.append(_section(task, rows))
        summary[name] = rows
        print(texts[-1], flush=True)
    if not arguments.develop:
        command = f"python -m benchmarks.cold_items --data {' '.join(arguments.data)}"
        (RESULTS / "cold-items.md").write_text(_record(command, texts))
    print(json.dumps(summary))


def measure(task: Task, minutes: float) -> dict[str, dict[str, Any]]:
    """The figures of each row: two models and what needs no model."""
    recipe = read_recipe("sasrec-ce", {"model": {"dim": 64}})
    plain, plain_facts = train(task, recipe, NO_ATTRIBUTES, minutes)
    encoder = AttributeEncoder.learn(task.attributes, task.catalogue)
    attributed, attributed_facts = train(task, recipe, encoder, minutes)
    known_F = NO_CONTEXT.known_at_request_F
    popularity = Popularity().fit(task.store, task.split, task.catalogue.num_rows)
    return {
        "model without attributes": figures(ModelScorer(plain, known_F), task) | plain_facts,
        "model with attributes": figures(ModelScorer(attributed, known_F), task) | attributed_facts,
        "popularity": figures(popularity, task),
        "popularity of attributes, sum": figures(AttributePopularity(task, "sum"), task),
        "popularity of attributes, mean": figures(AttributePopularity(task, "mean"), task),
        "profile of attributes": figures(AttributeProfile(task), task),
    }


def train(
    task: Task, recipe: Recipe, encoder: AttributeEncoder, minutes: float
) -> tuple[NextItemModel, dict[str, Any]]:
    """The model of the best validation, and what training took."""
    torch.manual_seed(0)
    features = ItemFeatures.build(task.catalogue, encoder)
    model = NextItemModel(recipe.model, task.catalogue.num_rows, (), features)
    config = TrainerConfig(max_epochs=task.max_epochs, precision="fp32")
    trainer = Trainer(
        recipe,
        config,
        model,
        task.store,
        task.split,
        NO_CONTEXT.known_at_request_F,
        seed=0,
        device=torch.device("cpu"),
    )
    started, best = time.perf_counter(), model.state_dict()
    while not trainer.should_stop and time.perf_counter() - started < 60 * minutes:
        epoch = trainer.train_epoch()
        if trainer.best_epoch == trainer.epoch:
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        print(f"{task.name}: epoch {epoch.epoch}, {epoch.loss:.4f}, {epoch.ndcg10:.4f}", flush=True)
    model.load_state_dict(best)
    return model, {
        "epochs": trainer.epoch,
        "best_epoch": trainer.best_epoch,
        "validation_ndcg10": trainer.best_ndcg10,
        "minutes": (time.perf_counter() - started) / 60,
    }


def figures(scorer: Scorer, task: Task) -> dict[str, Any]:
    """HR@10 and NDCG@10, each `[mean, low, high]`: cold items among all and among the cold ones
    alone, and warm items among all.
    """
    trials = {
        "cold, among all": (scorer, task.cold_targets),
        "cold, among cold": (Among(scorer, task.cold), task.cold_targets),
        "warm, among all": (scorer, task.warm_targets),
    }
    found = {}
    for name, (ranked, targets) in trials.items():
        ranking = rank_targets(
            ranked, task.store, targets.users_N, targets.targets_N, batch_size=256
        )
        intervals = accuracy_intervals(ranking.ranks_N)
        found[name] = {
            metric: [intervals[metric].mean, intervals[metric].low, intervals[metric].high]
            for metric in ("HR@10", "NDCG@10")
        }
    return found


def make_beauty(develop: bool) -> Task:
    """Amazon Beauty (5-core, as published with S3-Rec) with a random tenth of its items cold."""
    folder = Path(os.environ.get("NEXTITEM_DATA", "../shared/data")) / "beauty"
    lines = (folder / "Beauty.txt").read_text().splitlines()
    sequences = [np.array(line.split()[1:], np.int64) for line in lines]
    attributes = json.loads((folder / "Beauty_item2attributes.json").read_text())
    item_ids = np.unique(np.concatenate(sequences))
    shuffled = np.random.default_rng(0).permutation(item_ids)
    cold_ids, next_ids = np.split(shuffled, [len(item_ids) // 10, len(item_ids) // 5])[:2]
    if develop:
        item_ids = np.setdiff1d(item_ids, cold_ids)
        sequences = [items[~np.isin(items, cold_ids)] for items in sequences]
        cold_ids = next_ids

    items = pa.table({"item_id": item_ids, "attribute": [attributes[str(i)] for i in item_ids]})
    sequences = [_with_cold_at_the_end_alone(items, cold_ids) for items in sequences if len(items)]
    offsets_U = np.concatenate([[0], np.cumsum([len(items) for items in sequences])])
    store, split, catalogue = _encode(
        np.concatenate(sequences),
        offsets_U,
        np.zeros(offsets_U[-1], np.int64),
        items,
        lambda store: leave_one_out(store.offsets_U),
    )
    cold = catalogue.encode(pa.array(cold_ids))
    users_N = np.flatnonzero(split.test_U >= 0)
    tests = Targets(users_N, split.test_U[users_N])
    return Task(
        "beauty",
        catalogue,
        AttributesConfig(categorical=("attribute",)),
        store,
        split,
        cold,
        *_divide(tests, store, cold),
        max_epochs=20,
    )


def make_shop(develop: bool) -> Task:
    """The synthetic shop, where items open all the time: what opened after training is cold."""
    shop = build_shop(SHOP, seed=int(develop))
    trajectories = generate_part(shop, 0)
    moments = trajectories.moments
    # A cart or a purchase repeats the item that was viewed: it is no next item.
    users_T = np.repeat(np.arange(SHOP.num_users), np.diff(moments.offsets))
    is_next_T = (np.diff(trajectories.item, prepend=-1) != 0) | (np.diff(users_T, prepend=-1) != 0)
    lengths_U = np.bincount(users_T[is_next_T], minlength=SHOP.num_users)
    cuts = [SHOP.start_us + day * DAY_US for day in (VALIDATION_DAY, TEST_DAY)]
    store, split, catalogue = _encode(
        shop.catalogue.item_ids[trajectories.item[is_next_T]],
        np.concatenate([[0], np.cumsum(lengths_U)]),
        moments.time_us[is_next_T],
        items_table(shop),
        lambda store: temporal_cut(store.offsets_U, store.timestamps_T, cuts[0], cuts[1]),
    )
    cold = np.flatnonzero(catalogue.counts_I == 0)[NUM_SPECIAL:]
    users_N = np.flatnonzero(split.test_U >= 0)
    _, warm_targets = _divide(Targets(users_N, split.test_U[users_N]), store, cold)
    return Task(
        "shop",
        catalogue,
        AttributesConfig(categorical=("category", "brand"), bands=("price",)),
        store,
        split,
        cold,
        _first_cold(store, cold, cuts[1]),
        warm_targets,
        max_epochs=40,
    )


TASKS: dict[str, Callable[[bool], Task]] = {"beauty": make_beauty, "shop": make_shop}


def _with_cold_at_the_end_alone(item_ids: np.ndarray, cold_ids: np.ndarray) -> np.ndarray:
    """Without cold items, but for the last one where two events stand before it: it tests."""
    is_cold = np.isin(item_ids, cold_ids)
    is_kept = ~is_cold
    is_kept[-1] |= (~is_cold).sum() >= 2
    return item_ids[is_kept]


def _encode(
    item_ids_T: np.ndarray,
    offsets_U: np.ndarray,
    timestamps_T: np.ndarray,
    items: pa.Table,
    cut: Callable[[TokenStore], Split],
) -> tuple[TokenStore, Split, Catalogue]:
    """Tokens and their split, and a catalogue of all items with the counts of that split."""
    uncounted = Catalogue.build(
        items["item_id"].combine_chunks(), np.zeros(items.num_rows, np.int64), items
    )
    store = TokenStore(
        pa.array(np.arange(len(offsets_U) - 1)),
        offsets_U.astype(np.int64),
        uncounted.encode(pa.array(item_ids_T)),
        np.zeros((len(item_ids_T), 0), np.uint8),
        timestamps_T,
    )
    split = cut(store)
    counts_I = training_counts(store, split, uncounted.num_rows)
    return store, split, Catalogue.build(uncounted.item_ids, counts_I[NUM_SPECIAL:], items)


def _divide(targets: Targets, store: TokenStore, cold: np.ndarray) -> tuple[Targets, Targets]:
    """Targets that are cold items, and the others."""
    is_cold_N = np.isin(store.items_T[targets.targets_N], cold)
    return (
        Targets(targets.users_N[is_cold_N], targets.targets_N[is_cold_N]),
        Targets(targets.users_N[~is_cold_N], targets.targets_N[~is_cold_N]),
    )


def _first_cold(store: TokenStore, cold: np.ndarray, start_us: int) -> Targets:
    """Each user's first event on a cold item from then on, where an event stands before it."""
    is_cold_T = np.isin(store.items_T, cold) & (store.timestamps_T >= start_us)
    is_cold_T[store.offsets_U[:-1][np.diff(store.offsets_U) > 0]] = False
    targets = np.flatnonzero(is_cold_T)
    users = np.searchsorted(store.offsets_U, targets, side="right") - 1
    users_N, first = np.unique(users, return_index=True)
    return Targets(users_N, targets[first])


def _section(task: Task, rows: dict[str, dict[str, Any]]) -> str:
    columns = [
        (trial, metric)
        for trial in ("cold, among all", "cold, among cold", "warm, among all")
        for metric in ("HR@10", "NDCG@10")
    ]
    lines = [
        f"{task.name}: {task.catalogue.num_items:,} items, {len(task.cold):,} of them cold; "
        f"{len(task.cold_targets.users_N):,} cold and {len(task.warm_targets.users_N):,} warm "
        f"targets. At random HR@10 is {10 / task.catalogue.num_items:.4f} among all and "
        f"{10 / len(task.cold):.4f} among the cold.",
        "",
        "| | " + " | ".join(f"{trial}: {metric}" for trial, metric in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = [_cell(row[trial][metric]) for trial, metric in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [
        f"{name}: NDCG@10 {row['validation_ndcg10']:.4f} on (warm) validation, best of "
        f"{row['epochs']} epochs the {row['best_epoch']}th, {row['minutes']:.1f} minutes."
        for name, row in rows.items()
        if "epochs" in row
    ]
    return "\n".join(lines)


def _cell(interval: list[float]) -> str:
    mean, low, high = interval
    return f"{mean:.4f} ± {(high - low) / 2:.4f}"


def _record(command: str, texts: list[str]) -> str:
    recipe = "sasrec-ce at width 64, one thread, seed 0; 95 % intervals by bootstrap over users."
    return "\n\n".join(["# Cold items", f"`{command}` on {machine()}.\n{recipe}", *texts]) + "\n"


if __name__ == "__main__":
    main()
