"""A published model that answers requests: exact top-k over the whole catalogue, with the filters
applied before the selection, so that a list is full whenever enough items pass.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recsys.artifact import Artifact
from recsys.catalogue import PAD
from recsys.encoders import Backend, Provider, Variant, make_encoder
from recsys.errors import ArtifactError
from recsys.filters import AttributeFilter, ItemId, ItemIndex
from recsys.model import Request, append_request
from recsys.queries import Event, Query, encode_queries
from recsys.retrieval import Best, TableType, Wish, make_retriever, round_tables
from recsys.scorer import gather_histories
from recsys.tokens import TokenStore

_LARGEST_BATCH = 512
_TOKENS_OF_THREAD = 640
"""Tokens that a thread of a CPU encodes at once: what a block makes of them fits into the cache of
a core. With ten times as many a user takes 15 % longer in fp32, and 40 % in int8."""
_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True)
class SimilarQuery:
    """One list of items like a given one."""

    item_id: ItemId
    k: int = 10
    exclude_items: tuple[ItemId, ...] = ()
    attributes: AttributeFilter = field(default_factory=AttributeFilter)


@dataclass(frozen=True)
class Batch:
    """The queries that a list was ranked with."""

    size: int
    seconds: float
    """From the call to the end of the search."""


@dataclass(frozen=True)
class RankedList:
    """Best first. Empty where the model knows no item of the query."""

    item_ids: tuple[ItemId, ...]
    scores: tuple[float, ...]
    model_version: str
    unknown_items: int = 0
    """Items of the query that the catalogue does not know."""
    batch: Batch | None = field(default=None, compare=False)
    """None where nothing had to be ranked."""


@dataclass(frozen=True)
class RankerInfo:
    """What a ranker is made of."""

    model_version: str
    num_items: int
    device: str
    backend: Backend
    variant: Variant = "fp32"
    provider: Provider | None = None
    """Of ONNX Runtime, the one that was left of those wanted."""
    table: TableType = "fp32"


class Ranker:
    """Ranks any number of queries at once.

    Args:
        device: `auto` takes the GPU where there is one.
        backend: runs the encoder.
        variant: numbers that the encoder counts in, one of `recsys.encoders.VARIANTS`.
        provider: of ONNX Runtime, see `recsys.encoders.OnnxEncoder`; `auto`: that of the device.
        table: how the item vectors are kept, see `recsys.retrieval.round_tables`.
        num_threads: of a search on a CPU; torch's number by default.

    Raises: ArtifactError when weights, or the exported encoder, are missing or do not fit;
        ValueError when the variant and the backend, or the device, do not go together.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        device: str = "auto",
        backend: Backend = "torch",
        variant: Variant = "fp32",
        provider: Provider | Literal["auto"] = "auto",
        table: TableType = "fp32",
        num_threads: int | None = None,
    ) -> None:
        self._device = torch.device(_available_device() if device == "auto" else device)
        self._model = artifact.load_model().materialised()
        round_tables(self._model, table)
        self._model.to(self._device)
        self._index = ItemIndex(artifact.catalogue)
        self._context = artifact.context
        self._known_at_request_F = torch.from_numpy(artifact.context.known_at_request_F)
        if provider == "auto":
            provider = "cuda" if self._device.type == "cuda" else "cpu"
        self._encode = make_encoder(
            self._model, artifact.path, backend=backend, variant=variant, provider=provider
        )
        self._retriever = make_retriever(self._model, num_threads or torch.get_num_threads())
        self._blocked_mask = lru_cache(maxsize=64)(self._compute_blocked)
        self.info = RankerInfo(
            artifact.version,
            artifact.catalogue.num_items,
            str(self._device),
            backend,
            variant,
            getattr(self._encode, "provider", None),
            table,
        )

    def warm_up(self) -> None:
        """Ranks once, so that the first request finds everything loaded and compiled. Raises
        ArtifactError when the model gives scores that are not numbers.
        """
        (item_id,) = self._index.decode(self._index.by_count[:1])
        self.rank([Query((Event(item_id),), k=1, exclude_seen=False)])
        self.similar([SimilarQuery(item_id, k=1)])

    @torch.no_grad()
    def rank(self, queries: Sequence[Query]) -> list[RankedList]:
        """One list a query, in the order given.

        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        started = time.perf_counter()
        histories = [
            self._index.encode([event.item_id for event in query.history]) for query in queries
        ]
        answers = [self._empty(items_L) for items_L in histories]
        for rows in _chunks(histories):
            chunk = [queries[row] for row in rows]
            seen = [histories[row] if queries[row].exclude_seen else _NOTHING for row in rows]
            states_BD = self._encode_in_parts(self._make_inputs(chunk))
            found = self._retriever.by_product(states_BD, self._make_wishes(chunk, seen))
            for row, best in zip(rows, found, strict=True):
                batch = Batch(len(rows), time.perf_counter() - started)
                answers[row] = self._ranked(best, answers[row].unknown_items, batch)
        return answers

    @torch.no_grad()
    def rank_users(
        self, store: TokenStore, users_B: np.ndarray, k: int, *, exclude_seen: bool
    ) -> list[Best]:
        """What `rank` finds for users of a store, without an object an event: dense items, one list
        a user, in the order given.

        The last token of each user is the request, see `recsys.requests.append_requests`; an event
        comes before it at least.
        """
        config, asked_B = self._model.config, store.offsets_U[users_B + 1] - 1
        history = gather_histories(store, users_B, asked_B, config.history_len)
        request_BF = torch.from_numpy(store.context_TF[asked_B]).long()
        inputs = append_request(
            config,
            history.items_BL,
            history.context_BLF,
            history.seconds_BL,
            Request(request_BF, history.request_seconds_B),
            self._known_at_request_F,
        )
        starts_B = store.offsets_U[users_B] if exclude_seen else asked_B
        wishes = [
            Wish(k, store.items_T[start:end])
            for start, end in zip(starts_B.tolist(), asked_B.tolist(), strict=True)
        ]
        states_BD = self._encode_in_parts(self._on_device(inputs))
        found = self._retriever.by_product(states_BD, wishes)
        for best in found:
            self._refuse_broken(best)
        return found

    @torch.no_grad()
    def similar(self, queries: Sequence[SimilarQuery]) -> list[RankedList]:
        """One list a query, by the cosine between item vectors; the item itself is left out.

        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        started = time.perf_counter()
        wanted = [self._index.encode([query.item_id]) for query in queries]
        answers = [self._empty(items_L) for items_L in wanted]
        for rows in _chunks(wanted):
            own = [wanted[row] for row in rows]
            items_B = torch.from_numpy(np.concatenate(own)).to(self._device)
            wishes = self._make_wishes([queries[row] for row in rows], own)
            for row, best in zip(rows, self._retriever.by_cosine(items_B, wishes), strict=True):
                batch = Batch(len(rows), time.perf_counter() - started)
                answers[row] = self._ranked(best, 0, batch)
        return answers

    def _make_inputs(self, queries: Sequence[Query]) -> tuple[Tensor, ...]:
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
            self._known_at_request_F,
        )
        return self._on_device(inputs)

    def _on_device(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self._device) for tensor in inputs)

    def _encode_in_parts(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The states; on a CPU of few requests at a time, without the padding that they share."""
        num_requests, length = inputs[0].shape
        size = max(1, _TOKENS_OF_THREAD * torch.get_num_threads() // length)
        if self._device.type != "cpu" or num_requests <= size:
            return self._encode(*inputs)
        parts = zip(*(torch.split(tensor, size) for tensor in inputs), strict=True)
        return torch.cat([self._encode(*_without_padding(part)) for part in parts])

    def _make_wishes(
        self, queries: Sequence[Query | SimilarQuery], hidden: Sequence[np.ndarray]
    ) -> list[Wish]:
        """What each list may hold; `hidden` items are left out beside those of the query."""
        wishes = []
        for query, items in zip(queries, hidden, strict=True):
            if query.exclude_items:
                items = np.concatenate([items, self._index.encode(query.exclude_items)])
            is_filtered = query.attributes != AttributeFilter()
            blocked_I = self._blocked_mask(query.attributes) if is_filtered else None
            wishes.append(Wish(query.k, items, blocked_I))
        return wishes

    def _compute_blocked(self, wanted: AttributeFilter) -> Tensor:
        return torch.from_numpy(~self._index.allowed_mask(wanted)).to(self._device)

    def _empty(self, items_L: np.ndarray) -> RankedList:
        return RankedList((), (), self.info.model_version, int((items_L == PAD).sum()))

    def _ranked(self, best: Best, unknown_items: int, batch: Batch) -> RankedList:
        self._refuse_broken(best)
        return RankedList(
            tuple(self._index.decode(best.items.tolist())),
            tuple(best.scores.tolist()),
            self.info.model_version,
            unknown_items,
            batch,
        )

    def _refuse_broken(self, best: Best) -> None:
        if np.isnan(best.scores[:1]).any():
            raise ArtifactError(
                f"Version {self.info.model_version} gives scores that are not numbers; its weights "
                "are broken, so serve another version."
            )


def _without_padding(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Positions from the first on that one of the requests has a token at."""
    first = int((inputs[0] != PAD).any(0).int().argmax())
    return tuple(tensor[:, first:].contiguous() for tensor in inputs)


def _chunks(items: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Places of the queries that have a known item, as many at once as are encoded together."""
    known = [row for row, items_L in enumerate(items) if (items_L != PAD).any()]
    for start in range(0, len(known), _LARGEST_BATCH):
        yield known[start : start + _LARGEST_BATCH]


def _available_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
