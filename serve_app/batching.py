"""Dynamic batches that nobody waits for: what comes while one is worked on is the next one."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Batcher(Generic[Q, A]):
    """One batch at a time, in the order of arrival, for callers on one event loop.

    Args:
        work: answers a batch, in its order; what it raises is raised to every caller of the batch.
        max_size: of a batch.
    """

    def __init__(self, work: Callable[[list[Q]], Awaitable[list[A]]], max_size: int) -> None:
        self._work = work
        self._max_size = max_size
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Questions that no batch has taken up."""
        return len(self._waiting)

    async def ask(self, question: Q) -> A:
        """The answer; a caller that is cancelled before its batch begins is left out of it."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._worker is None:
            self._worker = asyncio.create_task(self._answer_all())
        return await future

    async def _answer_all(self) -> None:
        try:
            while batch := self._take():
                await self._answer(batch)
        finally:
            self._worker = None

    def _take(self) -> list[tuple[Q, asyncio.Future[A]]]:
        batch: list[tuple[Q, asyncio.Future[A]]] = []
        while self._waiting and len(batch) < self._max_size:
            question, future = self._waiting.popleft()
            if not future.done():
                batch.append((question, future))
        return batch

    async def _answer(self, batch: list[tuple[Q, asyncio.Future[A]]]) -> None:
        try:
            answers = await self._work([question for question, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
