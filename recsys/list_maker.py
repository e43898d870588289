"""Lists for many users at once, as the endpoint would give them one by one: the model's, and what
is popular for those whom the model does not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from recsys.artifact import Artifact
from recsys.encoders import Backend, Variant, variant_file
from recsys.fallback import Fallback
from recsys.filters import AttributeFilter, ItemId, ItemIndex
from recsys.ladder import Candidate, Ladder
from recsys.queries import Query, RequestContext
from recsys.ranker import RankedList, Ranker


@dataclass(frozen=True)
class MadeList:
    """Best first; empty only where nothing passes the filters."""

    item_ids: tuple[ItemId, ...]
    scores: tuple[float, ...]
    source: Literal["model", "fallback"]


class ListMaker:
    """The ranker of a version and the rungs below it.

    On a CPU the encoder runs under ONNX Runtime where the version was exported, as in serving; on a
    GPU with torch.

    Args:
        device: "cpu" or "cuda".
        variant: numbers that the encoder counts in; int8 is for CPUs.
        num_threads: of a search on a CPU; torch's number by default.

    Raises: ArtifactError when weights or fallback tables are missing or do not fit.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        variant: Variant = "fp32",
        num_threads: int | None = None,
    ) -> None:
        index = ItemIndex(artifact.catalogue)
        self._ladder = Ladder(Fallback.read(artifact.path / "fallback"), index)
        self.catalogue, self.context = artifact.catalogue, artifact.context
        self.ranker = _open_ranker(artifact, device, variant, num_threads)
        self._of_newcomer = lru_cache(maxsize=1024)(self._fill_for_newcomer)

    def make(self, queries: Sequence[Query]) -> list[MadeList]:
        """One list a query, in the order given.

        Who has seen all that passes the filters gets it again: a list is no answer without items.
        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        ranked = self.ranker.rank(queries)
        return [self._make(query, found) for query, found in zip(queries, ranked, strict=True)]

    def _make(self, query: Query, found: RankedList) -> MadeList:
        if found.item_ids:
            return MadeList(found.item_ids, found.scores, "model")
        # Those who did nothing yet differ in their segment alone.
        if query.history:
            return self._fill(query)
        return self._of_newcomer(
            query.context.segment, query.k, query.exclude_items, query.attributes
        )

    def _fill_for_newcomer(
        self,
        segment: str | None,
        k: int,
        exclude_items: tuple[ItemId, ...],
        attributes: AttributeFilter,
    ) -> MadeList:
        context = RequestContext(segment=segment)
        return self._fill(Query((), context, k, exclude_items=exclude_items, attributes=attributes))

    def _fill(self, query: Query) -> MadeList:
        history = [event.item_id for event in query.history]
        seen = history if query.exclude_seen else []
        excluded = [*query.exclude_items, *seen]
        candidates = self._climb_down(query, history, excluded)
        if not candidates:
            candidates = self._climb_down(query, history, query.exclude_items)
        return MadeList(
            tuple(candidate.item_id for candidate in candidates),
            tuple(candidate.score for candidate in candidates),
            "fallback",
        )

    def _climb_down(
        self, query: Query, history: Sequence[ItemId], excluded: Sequence[ItemId]
    ) -> list[Candidate]:
        return self._ladder.fill(
            query.k,
            history=history,
            segment=query.context.segment,
            exclude=excluded,
            attributes=query.attributes,
        )


def _open_ranker(
    artifact: Artifact, device: str, variant: Variant, num_threads: int | None
) -> Ranker:
    is_exported = device == "cpu" and (artifact.path / variant_file(variant)).is_file()
    backend: Backend = "onnx" if is_exported or variant == "int8" else "torch"
    return Ranker(
        artifact, device=device, backend=backend, variant=variant, num_threads=num_threads
    )
