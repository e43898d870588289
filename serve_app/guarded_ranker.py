"""The ranker as the ingress asks it: an answer is kept and shared, identical questions are asked
once, nobody waits longer than a deadline, and a sick ranker is left alone.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from recsys.queries import Query
from recsys.ranker import RankedList, RankerInfo, SimilarQuery
from serve_app.breaker import CircuitBreaker
from serve_app.cache import AnswerCache
from serve_app.errors import RankerSaturatedError, RankerUnavailableError
from serve_app.metrics import Metrics
from serve_app.model import Model
from serve_app.settings import Settings
from serve_app.shared_cache import SharedCache


class RankerClient(Protocol):
    """The ranker, wherever it runs. It answers with the version that is asked for, or with its
    champion where it does not have that one. All raise RankerUnavailableError when it cannot
    answer.
    """

    async def rank(self, query: Query, version: str) -> RankedList: ...

    async def similar(self, query: SimilarQuery, version: str) -> RankedList: ...

    async def describe(self) -> RankerInfo:
        """Returns once the ranker is warm."""
        ...


@dataclass(frozen=True)
class _Question:
    key: tuple[str, bytes]
    """Version and digest: everything that the answer depends on."""
    ask: Callable[[], Awaitable[RankedList]]


class GuardedRanker:
    """One per process."""

    def __init__(
        self,
        ranker: RankerClient,
        settings: Settings,
        metrics: Metrics,
        shared: SharedCache | None = None,
    ) -> None:
        self.breaker = CircuitBreaker(settings.breaker_failures, settings.breaker_open_s)
        self.info: RankerInfo | None = None
        self._ranker = ranker
        self._settings = settings
        self._metrics = metrics
        self._cache: AnswerCache[RankedList] | None = None
        if settings.cache_size:
            self._cache = AnswerCache(settings.cache_size, settings.cache_ttl_s)
        self._shared = shared

    async def is_ready(self, warm_up: Callable[[RankerClient], Awaitable[None]]) -> bool:
        """True from the first time on that the ranker is warm and `warm_up` went through."""
        if self.info is None:
            try:
                async with asyncio.timeout(1.0):
                    info = await self._ranker.describe()
                    await warm_up(self._ranker)
                    self.info = info
            except (RankerUnavailableError, TimeoutError):
                return False
        return True

    async def ask(
        self, model: Model, query: Query | SimilarQuery, deadline: float
    ) -> RankedList | None:
        """The ranker's list, or None when it is not to be had before `deadline`, a moment of
        `time.monotonic`.
        """
        ask = _asking(self._ranker, query, model.version)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                if self._cache is None:
                    return await self._ask_apart(ask)
                question = _Question((model.version, model.digest(query)), ask)
                return await self._ask_cached(self._cache, question)
        except (TimeoutError, RankerUnavailableError):
            return None

    async def _ask_apart(self, ask: Callable[[], Awaitable[RankedList]]) -> RankedList:
        # In a task of its own, which learns what became of the call after nobody waits any more.
        call = asyncio.create_task(self._call(ask))
        call.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(call)

    async def _ask_cached(self, cache: AnswerCache[RankedList], question: _Question) -> RankedList:
        cached = cache.get(question.key)
        if cached is not None:
            self._metrics.cache_lookups.labels("hit").inc()
            return cached
        return await cache.compute(
            question.key,
            lambda: self._ask_shared(question),
            # While versions change, the ranker may have answered with another one.
            keep=lambda ranked: ranked.model_version == question.key[0],
        )

    async def _ask_shared(self, question: _Question) -> RankedList:
        shared = None if self._shared is None else await self._shared.get(question.key)
        self._metrics.cache_lookups.labels("miss" if shared is None else "shared").inc()
        if shared is not None:
            return shared
        ranked = await self._call(question.ask)
        if self._shared is not None and ranked.model_version == question.key[0]:
            self._shared.put_later(question.key, ranked)
        return ranked

    async def _call(self, ask: Callable[[], Awaitable[RankedList]]) -> RankedList:
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
            outcome = outcome if outcome == "late" else "answered"
            return ranked
        except TimeoutError:
            raise RankerUnavailableError("The ranker did not answer.") from None
        except RankerSaturatedError:
            outcome = outcome if outcome == "late" else "saturated"
            raise
        finally:
            if outcome != "late":
                self._record(outcome, started)

    def _record(self, outcome: str, started: float) -> None:
        self._metrics.ranker_seconds.labels(outcome).observe(time.monotonic() - started)
        # Who has too much to do is not sick.
        if outcome in ("answered", "saturated"):
            self.breaker.record_success()
        else:
            self.breaker.record_failure()
        self._metrics.breaker_open.set(self.breaker.state != "closed")


def _asking(
    ranker: RankerClient, query: Query | SimilarQuery, version: str
) -> Callable[[], Awaitable[RankedList]]:
    if isinstance(query, SimilarQuery):
        return lambda: ranker.similar(query, version)
    return lambda: ranker.rank(query, version)
