"""The rankers of one process: every version that serves, behind one queue."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from recsys.artifact import load_artifact
from recsys.encoders import variant_file
from recsys.errors import ArtifactError
from recsys.queries import Query
from recsys.ranker import RankedList, Ranker, RankerInfo, SimilarQuery
from serve_app.batching import Batcher
from serve_app.errors import RankerSaturatedError, RankerUnavailableError
from serve_app.metrics import Metrics
from serve_app.settings import Settings
from serve_app.versions import Versions

_Call = Callable[[list[Any]], list[RankedList]]


class _Asked(NamedTuple):
    query: Query | SimilarQuery
    version: str


class RankerHost:
    """A `RankerClient` in this process. It is warm when it is made, and so is a new version before
    it takes over. Ranks in a thread of its own, a batch at a time: two would only share the cores.

    Raises: ArtifactError when the version that serves cannot be loaded.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._max_waiting = 4 * settings.max_batch_size
        self._versions = Versions(
            settings.registry,
            partial(_load_ranker, settings=settings),
            pinned=settings.version,
            on_change=metrics.serve,
            on_failure=lambda version: metrics.model_failures.labels("ranker").inc(),
        )
        self._versions.watch(settings.registry_poll_s)
        self._thread = ThreadPoolExecutor(1, "ranker")
        self._batches = Batcher(self._answer, settings.max_batch_size)
        self._broken: Exception | None = None

    async def rank(self, query: Query, version: str) -> RankedList:
        """See `RankerClient`. Raises RankerSaturatedError when too many wait already."""
        return await self._ask(_Asked(query, version))

    async def similar(self, query: SimilarQuery, version: str) -> RankedList:
        """See `RankerClient`, and `rank`."""
        return await self._ask(_Asked(query, version))

    async def describe(self) -> RankerInfo:
        """What the champion is made of."""
        return self._versions.champion.info

    def check_health(self) -> None:
        """Raises what broke the ranker, so that Serve starts another in its place."""
        if self._broken is not None:
            raise self._broken

    def close(self) -> None:
        """Ends the threads; waits for what is under way."""
        self._versions.close()
        self._thread.shutdown()

    async def _ask(self, asked: _Asked) -> RankedList:
        if self._batches.num_waiting >= self._max_waiting:
            raise RankerSaturatedError(f"{self._max_waiting} requests wait for the ranker already.")
        try:
            return await self._batches.ask(asked)
        finally:
            self._metrics.waiting.set(self._batches.num_waiting)

    async def _answer(self, asked: list[_Asked]) -> list[RankedList]:
        """A batch, a call for each version and kind of question in it."""
        self._metrics.batch_size.observe(len(asked))
        started = time.perf_counter()
        calls: dict[_Call, list[int]] = {}
        for place, (query, version) in enumerate(asked):
            ranker = self._versions.get(version)
            is_similar = isinstance(query, SimilarQuery)
            call: _Call = ranker.similar if is_similar else ranker.rank
            calls.setdefault(call, []).append(place)
        answers: dict[int, RankedList] = {}
        for call, places in calls.items():
            ranked = await self._run(call, [asked[place].query for place in places])
            answers.update(zip(places, ranked, strict=True))
        self._metrics.batch_seconds.observe(time.perf_counter() - started)
        return [answers[place] for place in range(len(asked))]

    async def _run(self, call: _Call, queries: list[Any]) -> list[RankedList]:
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, call, queries)
        except (RuntimeError, ArtifactError) as error:
            # The device failed or ran out of memory, or weights are no numbers.
            self._broken = error
            raise RankerUnavailableError(str(error)) from error


def _load_ranker(folder: Path, settings: Settings) -> Ranker:
    backend = settings.backend
    if backend == "auto":
        is_exported = (folder / variant_file(settings.variant)).is_file()
        backend = "onnx" if is_exported else "torch"
    ranker = Ranker(
        load_artifact(folder),
        device=settings.device,
        backend=backend,
        **settings.ranker_options,
    )
    ranker.warm_up()
    return ranker
