"""A published model that answers requests: exact top-k over the whole catalogue, with the filters
applied before the selection, so that a list is full whenever enough items pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recsys.artifact import Artifact
from recsys.catalogue import NUM_SPECIAL, PAD
from recsys.errors import ArtifactError
from recsys.export import MODEL_FILE, LastState, OnnxEncoder
from recsys.filters import AttributeFilter, ItemId, ItemIndex
from recsys.model import NextItemModel, Request, append_request
from recsys.queries import Event, Query, encode_queries

Backend = Literal["torch", "onnx"]
Encoder = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From the inputs of `NextItemModel.forward` to the state at the last position, `[B, D]`."""

_MAX_SCORES = 2**28
"""Scores that exist at the same time: 1 GiB in fp32."""


@dataclass(frozen=True)
class SimilarQuery:
    """One list of items like a given one."""

    item_id: ItemId
    k: int = 10
    exclude_items: tuple[ItemId, ...] = ()
    attributes: AttributeFilter = field(default_factory=AttributeFilter)


@dataclass(frozen=True)
class RankedList:
    """Best first. Empty where the model knows no item of the query."""

    item_ids: tuple[ItemId, ...]
    scores: tuple[float, ...]
    model_version: str
    unknown_items: int = 0
    """Items of the query that the catalogue does not know."""


@dataclass(frozen=True)
class RankerInfo:
    """What a ranker is made of."""

    model_version: str
    num_items: int
    device: str
    backend: Backend


class Ranker:
    """Ranks any number of queries at once.

    Args:
        device: `auto` takes the GPU where there is one.
        backend: runs the encoder; the product with the item table is torch's, in fp32, either way.

    Raises: ArtifactError when weights, or the exported encoder, are missing or do not fit.
    """

    def __init__(
        self, artifact: Artifact, *, device: str = "auto", backend: Backend = "torch"
    ) -> None:
        self._device = torch.device(_available_device() if device == "auto" else device)
        self._model = artifact.load_model().materialised().to(self._device)
        self._index = ItemIndex(artifact.catalogue)
        self._context = artifact.context
        self._encode = _encoder(backend, artifact.path, self._model)
        self._inverse_norms_I = _inverse_norms(self._model)
        self._blocked_mask = lru_cache(maxsize=64)(self._compute_blocked)
        self.info = RankerInfo(
            artifact.version, artifact.catalogue.num_items, str(self._device), backend
        )

    def warm_up(self) -> None:
        """Ranks once, so that the first request finds everything loaded. Raises ArtifactError when
        the model gives scores that are not numbers.
        """
        (item_id,) = self._index.decode(self._index.by_count[:1])
        self.rank([Query((Event(item_id),), k=1, exclude_seen=False)])
        self.similar([SimilarQuery(item_id, k=1)])

    @torch.no_grad()
    def rank(self, queries: Sequence[Query]) -> list[RankedList]:
        """One list a query, in the order given.

        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        histories = [
            self._index.encode([event.item_id for event in query.history]) for query in queries
        ]
        answers = [self._empty(items_L) for items_L in histories]
        for rows in self._chunks(histories):
            chunk = [queries[row] for row in rows]
            seen = [histories[row] if queries[row].exclude_seen else () for row in rows]
            for row, (items, scores) in zip(
                rows, self._select(self._score(chunk), chunk, seen), strict=True
            ):
                answers[row] = self._ranked(items, scores, answers[row].unknown_items)
        return answers

    @torch.no_grad()
    def similar(self, queries: Sequence[SimilarQuery]) -> list[RankedList]:
        """One list a query, by the cosine between item vectors; the item itself is left out.

        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        wanted = [self._index.encode([query.item_id]) for query in queries]
        answers = [self._empty(items_L) for items_L in wanted]
        for rows in self._chunks(wanted):
            chunk = [queries[row] for row in rows]
            own = [wanted[row] for row in rows]
            scores_BI = self._cosines(torch.from_numpy(np.concatenate(own)).to(self._device))
            for row, (items, scores) in zip(rows, self._select(scores_BI, chunk, own), strict=True):
                answers[row] = self._ranked(items, scores, 0)
        return answers

    def _chunks(self, items: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Places of the queries that have a known item, as many at once as their scores allow."""
        known = [row for row, items_L in enumerate(items) if (items_L != PAD).any()]
        size = max(1, min(512, _MAX_SCORES // self._index.num_rows))
        for start in range(0, len(known), size):
            yield known[start : start + size]

    def _score(self, queries: Sequence[Query]) -> Tensor:
        config = self._model.config
        encoded = encode_queries(queries, self._index, self._context, config.history_len)
        inputs = append_request(
            config,
            torch.from_numpy(encoded.items_BL),
            torch.from_numpy(encoded.context_BLF),
            torch.from_numpy(encoded.seconds_BL),
            Request(
                torch.from_numpy(encoded.request_BF), torch.from_numpy(encoded.request_seconds_B)
            ),
            torch.from_numpy(self._context.known_at_request_F),
        )
        hidden_BD = self._encode(*(tensor.to(self._device) for tensor in inputs))
        return self._model.scores(hidden_BD)

    def _cosines(self, items_B: Tensor) -> Tensor:
        table = self._model.output_table
        scores_BI: Tensor = table.products(table(items_B)) * self._inverse_norms_I
        scores_BI *= self._inverse_norms_I[items_B, None]
        scores_BI[:, :NUM_SPECIAL] = float("-inf")
        return scores_BI

    def _select(
        self,
        scores_BI: Tensor,
        queries: Sequence[Query | SimilarQuery],
        excluded: Sequence[Sequence[int] | np.ndarray],
    ) -> Iterator[tuple[list[int], list[float]]]:
        for scores_I, query in zip(scores_BI, queries, strict=True):
            if query.attributes != AttributeFilter():
                scores_I.masked_fill_(self._blocked_mask(query.attributes), float("-inf"))
        hidden = [
            np.concatenate([items, self._index.encode(query.exclude_items)]).astype(np.int64)
            for items, query in zip(excluded, queries, strict=True)
        ]
        rows = np.repeat(np.arange(len(queries)), [len(items) for items in hidden])
        scores_BI[torch.from_numpy(rows), torch.from_numpy(np.concatenate(hidden))] = float("-inf")

        top = scores_BI.topk(min(max(query.k for query in queries), self._index.num_rows))
        scores_BK, items_BK = top.values.cpu().numpy(), top.indices.cpu().numpy()
        if np.isnan(scores_BK).any():
            raise ArtifactError(
                f"Version {self.info.model_version} gives scores that are not numbers; its weights "
                "are broken, so serve another version."
            )
        for query, scores_K, items_K in zip(queries, scores_BK, items_BK, strict=True):
            count = int((scores_K[: query.k] > -np.inf).sum())
            yield items_K[:count].tolist(), scores_K[:count].tolist()

    def _compute_blocked(self, wanted: AttributeFilter) -> Tensor:
        return torch.from_numpy(~self._index.allowed_mask(wanted)).to(self._device)

    def _empty(self, items_L: np.ndarray) -> RankedList:
        return self._ranked([], [], int((items_L == PAD).sum()))

    def _ranked(self, items: list[int], scores: list[float], unknown_items: int) -> RankedList:
        return RankedList(
            tuple(self._index.decode(items)), tuple(scores), self.info.model_version, unknown_items
        )


@torch.no_grad()
def _inverse_norms(model: NextItemModel) -> Tensor:
    """One over the length of every item's vector, `[I]`, in blocks: a table may exist as codes."""
    items_I = torch.arange(len(model.item_bias), device=model.item_bias.device)
    norms = [model.output_table(items).norm(dim=1) for items in torch.split(items_I, 2**16)]
    return 1 / torch.cat(norms).clamp(min=1e-12)


def _available_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _encoder(backend: Backend, folder: Path, model: NextItemModel) -> Encoder:
    if backend == "torch":
        return LastState(model)
    return OnnxEncoder(folder / MODEL_FILE, model.config.max_len)
