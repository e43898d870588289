"""What the leader board takes of a scorer on a data set: accuracy, lists, parts of the targets."""

import logging
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.leaderboard_cells import METRICS
from benchmarks.leaderboard_files import MODEL, TIME_BLIND
from benchmarks.published import Dataset
from recsys.evaluation import Scorer
from recsys.interactions import training_counts
from recsys.leaderboard import Row, hash_targets, measure
from recsys.metrics import accuracy_intervals
from recsys.model import NextItemModel
from recsys.scorer import ModelScorer
from recsys.slices import slice_targets

MAX_USERS = 30_000
"""At most so many users, a seeded sample, are ranked where nothing else is said."""
_KINDS = ("history_length", "item_training_events", "device", "segment", "hour")
"""How targets are told apart: by device and segment where a row reads them, by hour where there are
times."""

log = logging.getLogger("leaderboard")


def measure_model(model: NextItemModel, dataset: Dataset, users: np.ndarray) -> list[Row]:
    """The test targets under a model, and, where it reads a context, as if nothing were known of
    the request."""
    known_F = dataset.context.known_at_request_F
    scorers = [ModelScorer(model, known_F, name=MODEL)]
    if len(known_F):
        scorers.append(ModelScorer(model, known_F, name=TIME_BLIND, knows_request=False))
    return [measure_scorer(scorer, dataset, users) for scorer in scorers]


def measure_scorer(scorer: Scorer, dataset: Dataset, users: np.ndarray) -> Row:
    """The test targets of some users."""
    counts_I = training_counts(dataset.store, dataset.split, dataset.catalogue.num_rows)
    row = measure(scorer, dataset.store, users, dataset.split.test_U[users], counts_I)
    log.info("%s: HR@10 %s, NDCG@10 %s", row.name, row.accuracy["HR@10"], row.accuracy["NDCG@10"])
    return row


def facts_of(dataset: Dataset, users: np.ndarray, rows: list[Row]) -> dict[str, Any]:
    """What was ranked, and how well, as JSON."""
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
        "lists": {row.name: row.lists for row in rows},
        "slices": {
            name: _measure_slice(rows, marks_T[targets]) for name, marks_T in dataset.marks.items()
        },
        "kinds": _measure_kinds(dataset, users, targets, rows),
    }


def _measure_kinds(
    dataset: Dataset, users: np.ndarray, targets: np.ndarray, rows: list[Row]
) -> dict[str, Any]:
    """Accuracy on each kind of target, in the order of the kinds."""
    store = dataset.store
    counts_I = training_counts(store, dataset.split, dataset.catalogue.num_rows)
    slicings = slice_targets(store, users, targets, counts_I, dataset.context)
    return {
        kind: {
            slicing.names[code]: _measure_slice(rows, slicing.codes_N == code)
            for code in np.unique(slicing.codes_N)
        }
        for kind, slicing in slicings.items()
        if kind in _KINDS
    }


def _measure_slice(rows: list[Row], is_in_N: np.ndarray) -> dict[str, Any]:
    """Accuracy on the marked targets alone."""
    of_rows = {row.name: accuracy_intervals(row.ranking.ranks_N[is_in_N]) for row in rows}
    return {
        "num_users": int(is_in_N.sum()),
        "test": {
            name: {metric: asdict(accuracy[metric]) for metric in METRICS}
            for name, accuracy in of_rows.items()
        },
    }
