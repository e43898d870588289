"""A model and the baselines on the same targets: every row's metrics, the paired comparisons, and
one table that a person reads.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.catalogue import NUM_SPECIAL, Catalogue
from recsys.comparison import Comparison, align_ranks, compare
from recsys.evaluation import Ranking, Scorer, rank_targets
from recsys.metrics import METRICS, Interval, accuracy_intervals, list_quality
from recsys.tokens import TokenStore

HEADLINE = "NDCG@10"
_COLUMNS = ("", "HR@10", "NDCG@10 (95 %)", "MRR@10", "HR@20", "cover.", "model's lift (95 %)")


@dataclass(frozen=True)
class Row:
    """One scorer on the targets."""

    name: str
    ranking: Ranking
    accuracy: dict[str, Interval]
    lists: dict[str, float]
    seconds: float

    def facts(self) -> dict[str, Any]:
        """The figures as JSON."""
        intervals = {name: asdict(interval) for name, interval in self.accuracy.items()}
        return {**intervals, **self.lists, "seconds": round(self.seconds, 3)}


def measure(
    scorer: Scorer,
    store: TokenStore,
    users_N: np.ndarray,
    targets_N: np.ndarray,
    counts_I: np.ndarray,
    *,
    filter_seen: bool = True,
    seed: int = 0,
    categories_I: np.ndarray | None = None,
) -> Row:
    """Ranks the targets and takes every metric; `counts_I` are training events, `categories_I` what
    `category_codes` gives.
    """
    started = time.perf_counter()
    ranking = rank_targets(scorer, store, users_N, targets_N, filter_seen=filter_seen)
    return Row(
        scorer.name,
        ranking,
        accuracy_intervals(ranking.ranks_N, seed=seed),
        list_quality(ranking.top_NK, counts_I, categories_I=categories_I),
        time.perf_counter() - started,
    )


def compare_rows(model: Row, baselines: Sequence[Row], *, seed: int = 0) -> dict[str, Comparison]:
    """The model against each baseline in NDCG@10, by the baseline's name."""
    return {
        row.name: compare(model.ranking.ranks_N, row.ranking.ranks_N, metric=HEADLINE, seed=seed)
        for row in baselines
    }


def compare_runs(
    ours: pa.Table, theirs: pa.Table, names: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, Comparison]]:
    """Two runs in every metric of `metrics.accuracy`, for each of the rows `names`.

    Both tables come from `ranks_table`. Raises: ValueError when their targets differ.
    """
    return {
        name: _compare_all(ours[name].to_numpy(), align_ranks(ours, theirs, name), seed)
        for name in names
    }


def _compare_all(
    our_ranks_N: np.ndarray, their_ranks_N: np.ndarray, seed: int
) -> dict[str, Comparison]:
    return {
        metric: compare(our_ranks_N, their_ranks_N, metric=metric, seed=seed) for metric in METRICS
    }


def comparison_facts(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON: `difference` and `lift` with their interval ends."""
    facts: dict[str, Any] = {"metric": comparison.metric}
    for name in ("difference", "lift"):
        interval: Interval | None = getattr(comparison, name)
        facts[name] = interval.mean if interval else None
        facts[f"{name}_low"] = interval.low if interval else None
        facts[f"{name}_high"] = interval.high if interval else None
    return {**facts, "is_significant": comparison.is_significant}


def category_codes(catalogue: Catalogue) -> np.ndarray | None:
    """A code for the category of each catalogue row, -1 without one, int32 `[I]`; None where the
    catalogue has no such column.
    """
    if "category" not in catalogue.table.column_names:
        return None
    codes = catalogue.column("category").dictionary_encode().indices
    none = np.full(NUM_SPECIAL, -1, np.int32)
    return np.concatenate([none, pc.fill_null(codes, -1).to_numpy(zero_copy_only=False)])


def hash_targets(
    store: TokenStore, users_N: np.ndarray, targets_N: np.ndarray, catalogue: Catalogue
) -> str:
    """sha256 of the sorted lines `user_id<tab>item_id`; equal hashes mean equal targets."""
    targets = ranks_table(store, users_N, targets_N, catalogue)
    ids = (targets[name].cast(pa.string()) for name in ("user_id", "item_id"))
    lines = pc.binary_join_element_wise(*ids, "\t").to_pylist()
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def ranks_table(
    store: TokenStore,
    users_N: np.ndarray,
    targets_N: np.ndarray,
    catalogue: Catalogue,
    rows: Sequence[Row] = (),
) -> pa.Table:
    """user_id, item_id and each row's rank: what a later paired comparison needs."""
    columns = {
        "user_id": store.user_ids.take(pa.array(users_N)),
        "item_id": catalogue.decode(store.items_T[targets_N]),
    }
    return pa.table(columns | {row.name: row.ranking.ranks_N.astype(np.int32) for row in rows})


def render(rows: Sequence[Row], comparisons: dict[str, Comparison]) -> str:
    """A Markdown table of at most 100 columns, aligned so that it reads well as plain text.

    The last column is the model's NDCG@10 relative to the row's, with its paired interval; `*`
    marks what is beyond noise.
    """
    cells = [_COLUMNS, *(_cells(row, comparisons.get(row.name)) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cells(row: Row, comparison: Comparison | None) -> tuple[str, ...]:
    ndcg = row.accuracy[HEADLINE]
    return (
        row.name,
        f"{row.accuracy['HR@10'].mean:.4f}",
        f"{ndcg.mean:.4f} ± {(ndcg.high - ndcg.low) / 2:.4f}",
        f"{row.accuracy['MRR@10'].mean:.4f}",
        f"{row.accuracy['HR@20'].mean:.4f}",
        f"{row.lists['coverage@10']:.1%}",
        _lift(comparison),
    )


def _lift(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    mark = "*" if comparison.is_significant else ""
    if comparison.lift is None:
        return f"{comparison.difference.mean:+.4f}{mark}"
    mean, low, high = (
        100 * value for value in (comparison.lift.mean, comparison.lift.low, comparison.lift.high)
    )
    digits = 1 if abs(high) < 100 else 0
    return f"{mean:+.{digits}f} % [{low:.{digits}f}, {high:.{digits}f}]{mark}"
