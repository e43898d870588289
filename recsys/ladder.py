"""The rungs below the model: co-visited with the history, popular in the segment, popular. They
need no ranker and respect every filter.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from recsys.catalogue import PAD
from recsys.fallback import Fallback, Scored
from recsys.filters import AttributeFilter, ItemId, ItemIndex

Source = Literal["model", "covisited", "popular_in_segment", "popular"]
"""The model, or a rung below it."""


class Candidate(NamedTuple):
    """An item with the rung it came from."""

    item_id: ItemId
    score: float
    source: Source


class _Ineligible:
    """A container of every item that a list may not hold."""

    def __init__(self, index: ItemIndex, wanted: AttributeFilter, excluded: np.ndarray) -> None:
        self._index = index
        self._allowed_I = index.allowed_mask(wanted)
        self._excluded = set(excluded.tolist())

    def __contains__(self, item_id: object) -> bool:
        assert isinstance(item_id, int | str)
        item = int(self._index.encode([item_id])[0])
        return item in self._excluded or not self._allowed_I[item]

    def drop_from(self, items: np.ndarray) -> np.ndarray:
        """What remains of dense items, in their order."""
        allowed = items[self._allowed_I[items]]
        remaining: np.ndarray = allowed[~np.isin(allowed, list(self._excluded))]
        return remaining

    def add(self, item_ids: Sequence[ItemId]) -> None:
        self._excluded.update(self._index.encode(item_ids).tolist())


class Ladder:
    """Fills a list rung by rung. The lowest rung is the whole catalogue by training events, so a
    list is full whenever enough items pass.
    """

    def __init__(self, fallback: Fallback, index: ItemIndex) -> None:
        self._fallback = fallback
        self._index = index

    def fill(
        self,
        k: int,
        *,
        history: Sequence[ItemId],
        segment: str | None,
        exclude: Sequence[ItemId],
        attributes: AttributeFilter,
    ) -> list[Candidate]:
        """At most `k` items, best rung first. Raises FilterError when the catalogue lacks an
        attribute.
        """
        ineligible = _Ineligible(self._index, attributes, self._index.encode(exclude))
        candidates: list[Candidate] = []
        for source, ranked in self._rungs(k, history, segment, ineligible):
            taken = ranked[: k - len(candidates)]
            candidates += [Candidate(item_id, score, source) for item_id, score in taken]
            if len(candidates) == k:
                break
            ineligible.add([item_id for item_id, _ in taken])
        return candidates

    def _rungs(
        self, k: int, history: Sequence[ItemId], segment: str | None, ineligible: _Ineligible
    ) -> Iterator[tuple[Source, Scored]]:
        known = self._index.encode(history)
        own_ids = self._index.decode(known[known != PAD])
        if own_ids:
            yield "covisited", self._fallback.covisited(own_ids, limit=k, exclude=ineligible)
        if segment is not None:
            yield (
                "popular_in_segment",
                self._fallback.popular_in(segment, limit=k, exclude=ineligible),
            )
        yield "popular", self._fallback.popular(limit=k, exclude=ineligible)
        yield "popular", self._by_count(k, ineligible)

    def _by_count(self, k: int, ineligible: _Ineligible) -> Scored:
        # Items that are not even among the popular ones; none was ever scored.
        eligible = ineligible.drop_from(self._index.by_count)[:k].tolist()
        return [(item_id, 0.0) for item_id in self._index.decode(eligible)]
