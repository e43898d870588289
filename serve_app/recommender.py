"""The service behind the endpoints: a visitor's history and version, the ranker within its
deadline, and the ladder below.

Only a ranker that is dead, saturated or late leads to the next rung; any other error is an error.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from recsys.catalogue import PAD
from recsys.filters import AttributeFilter, ItemId
from recsys.ladder import Candidate
from recsys.queries import Event, Query, RequestContext
from recsys.ranker import RankedList, RankerInfo, SimilarQuery
from recsys.registry import Serving
from serve_app.errors import HistoryUnavailableError
from serve_app.event_log import Owner
from serve_app.exposures import Exposure, ExposureLog
from serve_app.guarded_ranker import GuardedRanker, RankerClient
from serve_app.history_stores.store import HistoryStore
from serve_app.metrics import Metrics
from serve_app.model import Model
from serve_app.reasons import explain
from serve_app.schemas import (
    Filter,
    Recommendation,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
)
from serve_app.settings import Settings
from serve_app.shared_cache import SharedCache


class Models(Protocol):
    """The versions that serve; `serve_app.versions.Versions` is one."""

    @property
    def serving(self) -> Serving: ...

    @property
    def champion(self) -> Model: ...

    def choose(self, visitor: str) -> Model:
        """The version of a visitor, always the same one while shares stay."""
        ...


class Recommender:
    """Answers requests; one per process."""

    def __init__(
        self,
        models: Models,
        history: HistoryStore,
        ranker: RankerClient,
        settings: Settings,
        metrics: Metrics | None = None,
        *,
        shared_cache: SharedCache | None = None,
        exposures: ExposureLog | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.models = models
        self.history = history
        self.metrics = metrics or Metrics()
        self.ranker = GuardedRanker(ranker, settings, self.metrics, shared_cache)
        self._shared_cache = shared_cache
        self._exposures = exposures
        self._settings = settings
        self._now = now

    @property
    def ranker_info(self) -> RankerInfo | None:
        """None until the ranker was warm for the first time."""
        return self.ranker.info

    async def is_ready(self) -> bool:
        """True from the first time on that the ranker is warm, and so is the way to it."""
        return await self.ranker.is_ready(self._warm_up)

    async def close(self) -> None:
        """Writes what waits to be written."""
        if self._shared_cache is not None:
            await self._shared_cache.close()
        if self._exposures is not None:
            await asyncio.to_thread(self._exposures.close)

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """The list for one visitor.

        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        turn = self._begin(request, _visitor(request))
        try:
            history = await self._history_of(request, turn.deadline)
        except HistoryUnavailableError:
            history, turn.is_degraded = (), True
        query = self._query(request, history)
        seen = [event.item_id for event in history] if query.exclude_seen else []
        return await self._answer(request, turn, query, history, [*query.exclude_items, *seen])

    async def similar(self, request: SimilarRequest) -> RecommendResponse:
        """Items like a given one; below the model, what is co-visited with it.

        Raises: FilterError when a filter needs an attribute that the catalogue lacks.
        """
        turn = self._begin(request, None)
        query = SimilarQuery(
            request.item_id,
            request.top_k,
            tuple(request.filter.exclude_items),
            _attributes(request.filter),
        )
        exclude = [*query.exclude_items, query.item_id]
        return await self._answer(request, turn, query, (Event(query.item_id),), exclude)

    async def _warm_up(self, ranker: RankerClient) -> None:
        # What is slow the first time (routers, Arrow's kernels) is not a visitor's to pay.
        model = self.models.champion
        for item_id in model.index.decode(model.index.by_count[:5]):
            query = Query((Event(item_id),))
            model.digest(query)
            await ranker.rank(query, model.version)

    def _begin(self, request: RecommendRequest | SimilarRequest, visitor: str | None) -> "_Turn":
        started = time.monotonic()
        timeout_ms = request.timeout_ms or self._settings.deadline_ms
        recommendation_id = uuid.uuid4().hex
        # Who is not named sees a version by chance.
        model = self.models.choose(visitor or recommendation_id)
        return _Turn(recommendation_id, model, started, started + timeout_ms / 1000)

    async def _history_of(self, request: RecommendRequest, deadline: float) -> tuple[Event, ...]:
        if request.user_id is not None:
            return await self._recall("user_id", request.user_id, deadline)
        if request.session_id is not None:
            return await self._recall("session_id", request.session_id, deadline)
        if request.user_history is not None:
            return tuple(Event(item_id) for item_id in request.user_history)
        return tuple(
            Event(event.item_id, _microseconds(event.timestamp), event.event_type, event.device)
            for event in request.recent_events or ()
        )

    async def _recall(self, owner: Owner, name: ItemId, deadline: float) -> tuple[Event, ...]:
        started = time.monotonic()
        outcome = "failed"
        try:
            async with asyncio.timeout(deadline - started):
                found = await self.history.recent(owner, name, self._settings.history_limit)
            outcome = "answered"
            return found
        except TimeoutError:
            outcome = "late"
            raise HistoryUnavailableError("The history store did not answer in time.") from None
        finally:
            self.metrics.history_seconds.labels("recent", outcome).observe(
                time.monotonic() - started
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
                context.own,
            ),
            request.top_k,
            request.filter.exclude_seen,
            tuple(request.filter.exclude_items),
            _attributes(request.filter),
        )

    async def _answer(
        self,
        request: RecommendRequest | SimilarRequest,
        turn: "_Turn",
        query: Query | SimilarQuery,
        history: tuple[Event, ...],
        exclude: Sequence[ItemId],
    ) -> RecommendResponse:
        model = turn.model
        # Asked here first, so that a wrong filter is told from a sick ranker.
        model.index.allowed_mask(query.attributes)
        items = model.index.encode([event.item_id for event in history])
        num_known = int((items != PAD).sum())
        self.metrics.input_items.labels("true").inc(num_known)
        self.metrics.input_items.labels("false").inc(len(items) - num_known)

        version, candidates = model.version, list[Candidate]()
        if num_known:
            ranked = await self.ranker.ask(model, query, turn.deadline)
            turn.is_degraded |= ranked is None
            if ranked is not None:
                version, candidates = ranked.model_version, _candidates(ranked)
        if not candidates:
            candidates = model.ladder.fill(
                request.top_k,
                history=[event.item_id for event in history],
                segment=query.context.segment if isinstance(query, Query) else None,
                exclude=exclude,
                attributes=query.attributes,
            )
        response = RecommendResponse(
            recommendations=_numbered(candidates, history, model if request.explain else None),
            recommendation_id=turn.recommendation_id,
            model_version=version,
            source=candidates[0].source if candidates else "popular",
            degraded=turn.is_degraded,
            num_input_items=len(items),
            unknown_items=len(items) - num_known,
            took_ms=round((time.monotonic() - turn.started) * 1000, 2),
        )
        self._record(request, response, model)
        return response

    def _record(
        self, request: RecommendRequest | SimilarRequest, response: RecommendResponse, model: Model
    ) -> None:
        self.metrics.recommendations.labels(
            response.model_version, response.source, str(response.degraded).lower()
        ).inc()
        if self._exposures is None or not isinstance(request, RecommendRequest):
            return
        entries = response.recommendations
        self._exposures.add(
            Exposure(
                response.recommendation_id,
                None if request.user_id is None else str(request.user_id),
                None if request.session_id is None else str(request.session_id),
                round(self._now() * 1e6),
                model.version,
                response.source,
                response.degraded,
                tuple(str(entry.item_id) for entry in entries),
                entries[0].score if entries and response.source == "model" else None,
            )
        )


@dataclass
class _Turn:
    """One request on its way."""

    recommendation_id: str
    model: Model
    started: float
    deadline: float
    """As `started` a moment of `time.monotonic`."""
    is_degraded: bool = False


def _visitor(request: RecommendRequest) -> str | None:
    if request.user_id is not None:
        return f"user {request.user_id}"
    return None if request.session_id is None else f"session {request.session_id}"


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


def _numbered(
    candidates: Sequence[Candidate], history: Sequence[Event], explaining: Model | None
) -> list[Recommendation]:
    return [
        Recommendation(
            item_id=candidate.item_id,
            score=candidate.score,
            rank=rank,
            reason=explain(candidate, history, explaining) if explaining else None,
        )
        for rank, candidate in enumerate(candidates, start=1)
    ]


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1e6)
