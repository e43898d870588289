"""Ranked lists in memory: least recently used, for a limited time, and identical requests that come
together are computed once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from cachetools import TTLCache

V = TypeVar("V")


class AnswerCache(Generic[V]):
    """A key holds everything that an answer depends on, so that nothing ever has to be thrown out
    by hand. A cache of size 0 keeps nothing.
    """

    def __init__(
        self, size: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._answers: TTLCache[Hashable, V] = TTLCache(size, ttl_s, clock)
        self._flights: dict[Hashable, asyncio.Task[V]] = {}

    def get(self, key: Hashable) -> V | None:
        """The answer, if it is there."""
        return self._answers.get(key)

    async def compute(
        self,
        key: Hashable,
        compute: Callable[[], Awaitable[V]],
        keep: Callable[[V], bool] = lambda answer: True,
    ) -> V:
        """Computes an answer, or waits for the same one under way, and keeps it if `keep` says so.

        A caller that is cancelled (its deadline passed) leaves the computation running: it will
        answer the next request.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._run(key, compute, keep))
            # A failure that nobody waits for any more is not a warning.
            flight.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._flights[key] = flight
        return await asyncio.shield(flight)

    async def _run(
        self, key: Hashable, compute: Callable[[], Awaitable[V]], keep: Callable[[V], bool]
    ) -> V:
        try:
            answer = await compute()
            if self._answers.maxsize and keep(answer):
                self._answers[key] = answer
            return answer
        finally:
            del self._flights[key]
