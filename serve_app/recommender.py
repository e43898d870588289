"""The service behind the endpoints: history, cache, ranker within its deadline, and the ladder
below.

Only a ranker that is dead, saturated or late leads to the next rung; any other error is an error.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import torch

from recsys.artifact import Artifact
from recsys.blocks import bucket_ages
from recsys.catalogue import PAD
from recsys.fallback import Fallback
from recsys.filters import AttributeFilter, ItemId, ItemIndex
from recsys.model_config import ModelConfig
from recsys.queries import Event, Query, RequestContext, encode_queries
from recsys.ranker import RankedList, RankerInfo, SimilarQuery
from serve_app.breaker import CircuitBreaker
from serve_app.cache import AnswerCache
from serve_app.errors import RankerUnavailableError
from serve_app.history_stores.store import HistoryStore
from serve_app.ladder import Candidate, Ladder
from serve_app.metrics import Metrics
from serve_app.schemas import (
    Filter,
    Recommendation,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
)
from serve_app.settings import Settings


class RankerClient(Protocol):
    """The ranker, wherever it runs. All raise RankerUnavailableError when it cannot answer."""

    async def rank(self, query: Query) -> RankedList: ...

    async def similar(self, query: SimilarQuery) -> RankedList: ...

    async def describe(self) -> RankerInfo:
        """Returns once the ranker is warm."""
        ...


@dataclass(frozen=True)
class Model:
    """The parts of an artifact that the ingress works with."""

    version: str
    index: ItemIndex
    fallback: Fallback
    config: ModelConfig
    artifact: Artifact

    @classmethod
    def of(cls, artifact: Artifact) -> "Model":
        """Raises ArtifactError when the fallback tables are missing."""
        return cls(
            artifact.version,
            ItemIndex(artifact.catalogue),
            Fallback.read(artifact.path / "fallback"),
            ModelConfig.model_validate(artifact.config["model"]),
            artifact,
        )

    def digest(self, query: Query) -> bytes:
        """Equal for queries whose history and context are the same to the model: hours, gaps and
        the ages of events count by their buckets.
        """
        encoded = encode_queries(
            [query], self.index, self.artifact.context, self.config.history_len
        )
        seen = self.index.encode([event.item_id for event in query.history])
        parts = [encoded.items_BL, encoded.context_BLF, encoded.request_BF, seen]
        if self.config.time_bias:
            seconds_BL = torch.from_numpy(encoded.seconds_BL)
            asked_B1 = torch.from_numpy(encoded.request_seconds_B)[:, None]
            parts += [encoded.seconds_BL, bucket_ages(asked_B1, seconds_BL).numpy()]
        digest = hashlib.blake2b(repr([part.shape for part in parts]).encode())
        for part in parts:
            digest.update(part.tobytes())
        return digest.digest()


class Recommender:
    """Answers requests; one per process."""

    def __init__(
        self,
        model: Model,
        history: HistoryStore,
        ranker: RankerClient,
        settings: Settings,
        metrics: Metrics | None = None,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self.history = history
        self.metrics = metrics or Metrics()
        self.breaker = CircuitBreaker(settings.breaker_failures, settings.breaker_open_s)
        self.ranker_info: RankerInfo | None = None
        self._ladder = Ladder(model.fallback, model.index)
        self._ranker = ranker
        self._settings = settings
        self._now = now
        self._cache = AnswerCache[RankedList](settings.cache_size, settings.cache_ttl_s)
        self.metrics.model.labels(model.version).set(1)

    async def is_ready(self) -> bool:
        """True from the first time on that the ranker is warm, and so is the way to it."""
        if self.ranker_info is None:
            try:
                self.ranker_info = await asyncio.wait_for(self._warm_up(), 1.0)
            except (RankerUnavailableError, TimeoutError):
                return False
        return True

    async def _warm_up(self) -> RankerInfo:
        # What is slow the first time (routers, Arrow's kernels) is not a visitor's to pay.
        info = await self._ranker.describe()
        for item_id in self.model.index.decode(self.model.index.by_count[:5]):
            query = Query((Event(item_id),))
            self.model.digest(query)
            await self._ranker.rank(query)
        return info

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """The list for one visitor.

        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        started = time.monotonic()
        query = self._query(request, await self._history_of(request))
        item_ids = [event.item_id for event in query.history]
        question = _Question(
            key=lambda: (self.model.digest(query), query.exclude_seen, *_limits(query)),
            ask=lambda: self._ranker.rank(query),
            item_ids=item_ids,
            segment=query.context.segment,
            exclude=[*query.exclude_items, *(item_ids if query.exclude_seen else ())],
            attributes=query.attributes,
        )
        return await self._answer(request, question, started)

    async def similar(self, request: SimilarRequest) -> RecommendResponse:
        """Items like a given one; below the model, what is co-visited with it.

        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        started = time.monotonic()
        query = SimilarQuery(
            request.item_id,
            request.top_k,
            tuple(request.filter.exclude_items),
            _attributes(request.filter),
        )
        question = _Question(
            key=lambda: ("similar", str(query.item_id), *_limits(query)),
            ask=lambda: self._ranker.similar(query),
            item_ids=[query.item_id],
            segment=None,
            exclude=[*query.exclude_items, query.item_id],
            attributes=query.attributes,
        )
        return await self._answer(request, question, started)

    async def _history_of(self, request: RecommendRequest) -> tuple[Event, ...]:
        limit = self._settings.history_limit
        if request.user_id is not None:
            return await self.history.recent("user_id", request.user_id, limit)
        if request.session_id is not None:
            return await self.history.recent("session_id", request.session_id, limit)
        if request.user_history is not None:
            return tuple(Event(item_id) for item_id in request.user_history)
        return tuple(
            Event(event.item_id, _microseconds(event.timestamp), event.event_type, event.device)
            for event in request.recent_events or ()
        )

    def _query(self, request: RecommendRequest, history: tuple[Event, ...]) -> Query:
        context = request.context
        asked_us = _microseconds(context.timestamp)
        return Query(
            history,
            RequestContext(
                round(self._now() * 1e6) if asked_us is None else asked_us,
                context.timezone,
                context.device,
                context.segment,
            ),
            request.top_k,
            request.filter.exclude_seen,
            tuple(request.filter.exclude_items),
            _attributes(request.filter),
        )

    async def _answer(
        self, request: RecommendRequest | SimilarRequest, question: "_Question", started: float
    ) -> RecommendResponse:
        # Asked here first, so that a wrong filter is told from a sick ranker.
        self.model.index.allowed_mask(question.attributes)
        items = self.model.index.encode(question.item_ids)
        num_known = int((items != PAD).sum())
        self.metrics.input_items.labels("true").inc(num_known)
        self.metrics.input_items.labels("false").inc(len(items) - num_known)

        ranked, version = None, self.model.version
        if num_known:
            timeout_ms = request.timeout_ms or self._settings.deadline_ms
            ranked = await self._ask(question, started + timeout_ms / 1000)
        if ranked is not None and ranked.item_ids:
            candidates, version = _candidates(ranked), ranked.model_version
        else:
            candidates = self._ladder.fill(
                request.top_k,
                history=question.item_ids,
                segment=question.segment,
                exclude=question.exclude,
                attributes=question.attributes,
            )
        source = candidates[0].source if candidates else "popular"
        degraded = bool(num_known) and ranked is None
        self.metrics.recommendations.labels(source, str(degraded).lower()).inc()
        return RecommendResponse(
            recommendations=_numbered(candidates, request.explain),
            recommendation_id=uuid.uuid4().hex,
            model_version=version,
            source=source,
            degraded=degraded,
            num_input_items=len(items),
            unknown_items=len(items) - num_known,
            took_ms=round((time.monotonic() - started) * 1000, 2),
        )

    async def _ask(self, question: "_Question", deadline: float) -> RankedList | None:
        """The ranker's list, or None when it is not to be had in time."""
        key = (self.model.version, question.key())
        cached = self._cache.get(key)
        self.metrics.cache_lookups.labels("miss" if cached is None else "hit").inc()
        if cached is not None:
            return cached
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._cache.compute(
                    key,
                    lambda: self._call_ranker(question.ask),
                    # While versions change, the ranker may be ahead of this process.
                    keep=lambda ranked: ranked.model_version == self.model.version,
                )
        except (TimeoutError, RankerUnavailableError):
            return None

    async def _call_ranker(self, ask: Callable[[], Awaitable[RankedList]]) -> RankedList:
        if not self.breaker.allows():
            raise RankerUnavailableError("The ranker failed several times and is left alone.")
        started = time.monotonic()
        call = asyncio.ensure_future(ask())
        # A late answer is a failure to the breaker at once, and still welcome in the cache.
        outcome = "failed"
        try:
            await asyncio.wait({call}, timeout=self._settings.deadline_ms / 1000)
            if not call.done():
                outcome = "late"
                self._record(outcome, started)
            ranked = await asyncio.wait_for(call, self._settings.ranker_timeout_ms / 1000)
            if outcome != "late":
                outcome = "answered"
            return ranked
        except TimeoutError:
            raise RankerUnavailableError("The ranker did not answer.") from None
        finally:
            if outcome != "late":
                self._record(outcome, started)

    def _record(self, outcome: str, started: float) -> None:
        self.metrics.ranker_seconds.labels(outcome).observe(time.monotonic() - started)
        if outcome == "answered":
            self.breaker.record_success()
        else:
            self.breaker.record_failure()
        self.metrics.breaker_open.set(self.breaker.state != "closed")


@dataclass(frozen=True)
class _Question:
    """What the model is asked, and what the ladder needs in its place."""

    key: Callable[[], Hashable]
    ask: Callable[[], Awaitable[RankedList]]
    item_ids: Sequence[ItemId]
    segment: str | None
    exclude: Sequence[ItemId]
    attributes: AttributeFilter


def _limits(query: Query | SimilarQuery) -> tuple[Hashable, ...]:
    return query.k, frozenset(query.exclude_items), query.attributes


def _attributes(wanted: Filter) -> AttributeFilter:
    return AttributeFilter(
        frozenset(wanted.include_categories),
        frozenset(wanted.exclude_categories),
        wanted.available_only,
        wanted.min_price,
        wanted.max_price,
    )


def _candidates(ranked: RankedList) -> list[Candidate]:
    pairs = zip(ranked.item_ids, ranked.scores, strict=True)
    return [Candidate(item_id, score, "model") for item_id, score in pairs]


def _numbered(candidates: Sequence[Candidate], explain: bool) -> list[Recommendation]:
    return [
        Recommendation(
            item_id=candidate.item_id,
            score=candidate.score,
            rank=rank,
            reason=candidate.source if explain else None,
        )
        for rank, candidate in enumerate(candidates, start=1)
    ]


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1e6)
