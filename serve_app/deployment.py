"""Ray Serve: rankers that answer in dynamic batches, behind ingresses with the FastAPI app.

serve run serve_app.deployment:build registry=/srv/registry history_path=/srv/history.sqlite
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from recsys.artifact import load_artifact
from recsys.encoders import Backend
from recsys.errors import ArtifactError
from recsys.queries import Query
from recsys.ranker import RankedList, Ranker, RankerInfo, SimilarQuery
from recsys.registry import serving_version
from serve_app.api import create_app
from serve_app.errors import RankerUnavailableError
from serve_app.history import SqliteHistory
from serve_app.recommender import Model, Recommender
from serve_app.seeds import find_seed, load_seed
from serve_app.settings import Settings


class RankerDeployment:
    """One `Ranker`. It is warm before Serve sends it the first request."""

    def __init__(
        self, folder: Path, device: str, backend: Backend, max_batch_size: int, **options: Any
    ) -> None:
        self._ranker = Ranker(load_artifact(folder), device=device, backend=backend, **options)
        self._ranker.warm_up()
        self._rank_batch.set_max_batch_size(max_batch_size)
        # One batch at a time: two would only share the same cores.
        self._turn = asyncio.Lock()
        self._broken: Exception | None = None

    async def rank(self, query: Query) -> RankedList:
        ranked: RankedList = await self._rank_batch(query)
        return ranked

    async def similar(self, query: SimilarQuery) -> RankedList:
        return (await self._run(self._ranker.similar, [query]))[0]

    async def describe(self) -> RankerInfo:
        return self._ranker.info

    def check_health(self) -> None:
        """Raises what broke the ranker, so that Serve starts another in its place."""
        if self._broken is not None:
            raise self._broken

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _rank_batch(self, queries: list[Query]) -> list[RankedList]:
        return await self._run(self._ranker.rank, queries)

    async def _run(
        self, rank: Callable[[list[Any]], list[RankedList]], queries: list[Any]
    ) -> list[RankedList]:
        async with self._turn:
            try:
                return await asyncio.to_thread(rank, queries)
            except (RuntimeError, ArtifactError) as error:
                # The device failed or ran out of memory, or weights are no numbers.
                self._broken = error
                raise RankerUnavailableError(str(error)) from error


class ServeRanker:
    """`RankerClient` over a handle of Serve: what says that no replica answers becomes
    RankerUnavailableError, an error of the code stays what it is.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def rank(self, query: Query) -> RankedList:
        ranked: RankedList = await _call(lambda: self._handle.rank.remote(query))
        return ranked

    async def similar(self, query: SimilarQuery) -> RankedList:
        ranked: RankedList = await _call(lambda: self._handle.similar.remote(query))
        return ranked

    async def describe(self) -> RankerInfo:
        info: RankerInfo = await _call(lambda: self._handle.describe.remote())
        return info


class Ingress:
    """One process of the HTTP endpoint. Raises SettingsError and ArtifactError at its start."""

    def __init__(self, folder: Path, settings: Settings, ranker: DeploymentHandle) -> None:
        model = Model.of(load_artifact(folder))
        history = SqliteHistory(settings.history_path)
        seed = find_seed(settings.history_seed, folder)
        if seed is not None:
            load_seed(history, seed)
        self._settings = settings
        self._recommender = Recommender(model, history, ServeRanker(ranker), settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._recommender, self._settings, echo_request_id=False)


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run` and Serve configurations; `args` are fields of `Settings`.

    Raises: SettingsError for wrong settings; ArtifactError when no version serves.
    """
    settings = Settings.from_environment(os.environ, args)
    version = settings.version or serving_version(settings.registry)
    folder = settings.registry / version
    ranker = serve.deployment(
        RankerDeployment,
        name="Ranker",
        max_ongoing_requests=4 * settings.max_batch_size,
        # Beyond these a request is better answered by the next rung than late.
        max_queued_requests=4 * settings.max_batch_size,
        ray_actor_options={"num_cpus": settings.ranker_cpus, "num_gpus": settings.ranker_gpus},
        autoscaling_config={
            "min_replicas": settings.min_rankers,
            "max_replicas": max(settings.min_rankers, settings.max_rankers),
            "target_ongoing_requests": settings.max_batch_size,
        },
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
    ).bind(
        folder,
        settings.device,
        settings.backend,
        settings.max_batch_size,
        **settings.ranker_options,
    )
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        # The gate inside sheds with 429 and a problem; Serve's own bound lies beyond it.
        max_ongoing_requests=2 * settings.max_in_flight,
    ).bind(folder, settings, ranker)


async def _call(call: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await call()
    except RayTaskError as error:
        if isinstance(error.cause, RankerUnavailableError | RayServeException):
            raise RankerUnavailableError(str(error.cause)) from error
        raise
    except (RayError, RayServeException) as error:
        raise RankerUnavailableError(str(error)) from error
