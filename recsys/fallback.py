"""Answers for when no model answers: what is popular, popular in a segment, and co-visited.

The tables are written from training data beside the model; `Fallback` reads them inside the HTTP
ingress with NumPy alone.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.catalogue import Catalogue
from recsys.context import UNKNOWN, ContextEncoder
from recsys.covisitation import DECAY, RECENT_EVENTS, find_neighbours
from recsys.errors import ArtifactError
from recsys.filters import ItemId
from recsys.interactions import find_recent, training_positions
from recsys.splits import Split
from recsys.tokens import TokenStore

POPULAR = "popular.parquet"
SEGMENTS = "segments.parquet"
COVISITED = "covisited.parquet"


Scored = list[tuple[ItemId, float]]
"""Item ids of the shop with their scores, best first."""


@dataclass(frozen=True)
class Neighbours:
    """Items beside items in CSR form: those of item `i` are `items[offsets[i]:offsets[i + 1]]`."""

    item_ids: Sequence[ItemId]
    index: Mapping[ItemId, int]
    offsets: np.ndarray
    items: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Fallback:
    """Lists that need no model. Every method takes item ids of the shop's own type, leaves out what
    `exclude` contains, and gives at most `limit` items; what it does not know gives an empty list.
    """

    _popular: Scored
    _segments: Mapping[str, Scored]
    _neighbours: Neighbours

    @classmethod
    def read(cls, folder: Path) -> "Fallback":
        """Reads the tables of `write_fallback`. Raises ArtifactError when one is missing or
        broken.
        """
        popular = _read_table(folder / POPULAR)
        segments = _read_table(folder / SEGMENTS)
        return cls(
            list(zip(popular["item_id"].to_pylist(), popular["score"].to_pylist(), strict=True)),
            _group_by_segment(segments),
            _read_neighbours(_read_table(folder / COVISITED)),
        )

    def popular(self, *, limit: int = 10, exclude: Container[ItemId] = ()) -> Scored:
        """The most popular items."""
        return _take(self._popular, limit, exclude)

    def popular_in(
        self, segment: str, *, limit: int = 10, exclude: Container[ItemId] = ()
    ) -> Scored:
        """The most popular items among the users of a segment."""
        return _take(self._segments.get(segment, ()), limit, exclude)

    def covisited(
        self, history: Sequence[ItemId], *, limit: int = 10, exclude: Container[ItemId] = ()
    ) -> Scored:
        """Neighbours of the last events of a history (oldest first), the latest event counting
        most.

        Items of the history itself may be among them: pass them in `exclude` to leave them out.
        """
        table = self._neighbours
        rows = [table.index.get(item_id) for item_id in reversed(history[-RECENT_EVENTS:])]
        spans = [
            (slice(table.offsets[row], table.offsets[row + 1]), DECAY**age)
            for age, row in enumerate(rows)
            if row is not None
        ]
        if not spans:
            return []

        items = np.concatenate([table.items[span] for span, _ in spans])
        scores = np.concatenate([table.scores[span] * weight for span, weight in spans])
        merged, where = np.unique(items, return_inverse=True)
        totals = np.bincount(where, scores)
        best_first = np.argsort(-totals, kind="stable")
        ranked = ((table.item_ids[merged[place]], float(totals[place])) for place in best_first)
        return _take(ranked, limit, exclude)

    def because(self, item_id: ItemId, history: Sequence[ItemId]) -> ItemId | None:
        """The item of a history (oldest first) that is co-visited most with an item, the latest
        counting most; None where none of the last ones is.
        """
        table = self._neighbours
        wanted = table.index.get(item_id)
        best, best_score = None, 0.0
        for age, own_id in enumerate(reversed(history[-RECENT_EVENTS:])):
            row = table.index.get(own_id)
            if row is None or wanted is None:
                continue
            span = slice(table.offsets[row], table.offsets[row + 1])
            found = np.flatnonzero(table.items[span] == wanted)
            if found.size:
                score = float(table.scores[span][found[0]]) * DECAY**age
                if score > best_score:
                    best, best_score = own_id, score
        return best


def write_fallback(
    folder: Path,
    store: TokenStore,
    split: Split,
    catalogue: Catalogue,
    context: ContextEncoder,
    *,
    recent_days: float = 7,
    num_popular: int = 1000,
    num_in_segment: int = 500,
    num_covisited: int = 50,
    covisitation: Mapping[str, float] | None = None,
) -> None:
    """Writes popular.parquet (item_id, score, rank), segments.parquet (segment, item_id, score) and
    covisited.parquet (item_id, neighbour_id, score), each best first, from training events alone.

    Popularity is the mean of two shares of the events: of the whole period, and of its last
    `recent_days`; the first is reliable, the second is up to date. `covisitation` are the settings
    of `find_neighbours` that are not its defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    positions_T = training_positions(store, split)
    items_T = store.items_T[positions_T]
    is_recent_T = find_recent(store.timestamps_T[positions_T], recent_days)

    popular = _most_popular(items_T, is_recent_T, catalogue, num_popular)
    ranks = pa.array(np.arange(1, popular.num_rows + 1, dtype=np.int32))
    pq.write_table(popular.append_column("rank", ranks), folder / POPULAR)

    segments = [_with_segment(popular.slice(0, 0), "")]
    for name, chosen in _segments_of(store, positions_T, context):
        best = _most_popular(items_T[chosen], is_recent_T[chosen], catalogue, num_in_segment)
        segments.append(_with_segment(best, name))
    pq.write_table(pa.concat_tables(segments), folder / SEGMENTS)

    pq.write_table(
        _covisited(store, split, catalogue, num_covisited, covisitation or {}), folder / COVISITED
    )


def _with_segment(popular: pa.Table, name: str) -> pa.Table:
    return popular.add_column(0, "segment", pa.array([name] * popular.num_rows, pa.string()))


def _most_popular(
    items_T: np.ndarray, is_recent_T: np.ndarray, catalogue: Catalogue, limit: int
) -> pa.Table:
    all_I = np.bincount(items_T, minlength=catalogue.num_rows)
    recent_I = np.bincount(items_T[is_recent_T], minlength=catalogue.num_rows)
    share_I = all_I / max(all_I.sum(), 1) + recent_I / max(recent_I.sum(), 1)
    best_K = np.argsort(-share_I, kind="stable")[:limit]
    best_K = best_K[all_I[best_K] > 0]
    scores_K = (share_I[best_K] / 2).astype(np.float32)
    return pa.table({"item_id": catalogue.decode(best_K), "score": scores_K})


def _segments_of(
    store: TokenStore, positions_T: np.ndarray, context: ContextEncoder
) -> Iterator[tuple[str, np.ndarray]]:
    """Each known segment with the places in `positions_T` of its events."""
    if "segment" not in context.fields:
        return
    codes_T = store.context_TF[positions_T, context.fields.index("segment")]
    by_code = np.argsort(codes_T, kind="stable")
    ends = np.cumsum(np.bincount(codes_T, minlength=UNKNOWN + 1))
    for code, name in enumerate(context.vocabularies["segment"], start=UNKNOWN + 1):
        if code < len(ends) and ends[code] > ends[code - 1]:
            yield name, by_code[ends[code - 1] : ends[code]]


def _covisited(
    store: TokenStore,
    split: Split,
    catalogue: Catalogue,
    limit: int,
    settings: Mapping[str, Any],
) -> pa.Table:
    neighbours = find_neighbours(store, split, catalogue.num_rows, limit=limit, **settings)
    items = np.repeat(np.arange(catalogue.num_rows), np.diff(neighbours.indptr))
    return pa.table(
        {
            "item_id": catalogue.decode(items),
            "neighbour_id": catalogue.decode(neighbours.indices),
            "score": neighbours.data.astype(np.float32),
        }
    )


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtifactError(
            f"The fallback table {path} cannot be read: {error}; publish the version again."
        ) from error


def _group_by_segment(table: pa.Table) -> dict[str, Scored]:
    groups: dict[str, Scored] = {}
    columns = (table[name].to_pylist() for name in ("segment", "item_id", "score"))
    for segment, item_id, score in zip(*columns, strict=True):
        groups.setdefault(segment, []).append((item_id, score))
    return groups


def _read_neighbours(table: pa.Table) -> Neighbours:
    # Both columns are encoded over the same ids; the items come first, so they get the first codes,
    # in the order of their rows.
    both = pa.chunked_array([*table["item_id"].chunks, *table["neighbour_id"].chunks])
    encoded = both.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    item_ids = encoded.dictionary.to_pylist()
    counts = np.bincount(codes[: table.num_rows], minlength=len(item_ids))
    return Neighbours(
        item_ids,
        {item_id: row for row, item_id in enumerate(item_ids)},
        np.concatenate([[0], np.cumsum(counts)]),
        codes[table.num_rows :],
        table["score"].to_numpy(),
    )


def _take(
    ranked: Sequence[tuple[ItemId, float]] | Iterator[tuple[ItemId, float]],
    limit: int,
    exclude: Container[ItemId],
) -> Scored:
    taken: Scored = []
    for item_id, score in ranked:
        if len(taken) >= limit:
            break
        if item_id not in exclude:
            taken.append((item_id, score))
    return taken
