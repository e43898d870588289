"""Ray Serve: rankers that answer in dynamic batches, behind ingresses with the FastAPI app.

serve run serve_app.deployment:build registry=/srv/registry history_path=/srv/history.sqlite
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application
from ray.serve import metrics as ray_metrics
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from recsys.artifact import load_artifact
from recsys.encoders import variant_file
from recsys.errors import ArtifactError
from recsys.queries import Query
from recsys.ranker import RankedList, Ranker, RankerInfo, SimilarQuery
from recsys.registry import read_serving
from serve_app.api import create_app
from serve_app.errors import RankerSaturatedError, RankerUnavailableError
from serve_app.exposures import open_exposures
from serve_app.history_stores.seeds import find_seed, load_seed
from serve_app.intake import open_intake
from serve_app.metrics import MULTIPROCESS_DIR, Metrics
from serve_app.model import Model
from serve_app.recommender import Recommender
from serve_app.settings import Settings
from serve_app.shared_cache import open_shared_cache
from serve_app.versions import Versions


class RankerDeployment:
    """The `Ranker` of every version that serves. It is warm before Serve sends it the first
    request, and so is a new version before it takes over.
    """

    def __init__(self, settings: Settings) -> None:
        self._metrics = Metrics("ranker", ray_metrics)
        self._versions = Versions(
            settings.registry,
            partial(_load_ranker, settings=settings),
            pinned=settings.version,
            on_change=self._metrics.serve,
            on_failure=lambda version: self._metrics.model_failures.labels("ranker").inc(),
        )
        self._versions.watch(settings.registry_poll_s)
        self._rank_batch.set_max_batch_size(settings.max_batch_size)
        # One batch at a time: two would only share the same cores.
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._broken: Exception | None = None

    async def rank(self, query: Query, version: str) -> RankedList:
        with self._waiting():
            ranked: RankedList = await self._rank_batch((query, version))
        return ranked

    async def similar(self, query: SimilarQuery, version: str) -> RankedList:
        with self._waiting():
            return (await self._run(self._versions.get(version).similar, [query]))[0]

    async def describe(self) -> RankerInfo:
        return self._versions.champion.info

    def check_health(self) -> None:
        """Raises what broke the ranker, so that Serve starts another in its place."""
        if self._broken is not None:
            raise self._broken

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._num_waiting += 1
        self._metrics.waiting.set(self._num_waiting)
        try:
            yield
        finally:
            self._num_waiting -= 1
            self._metrics.waiting.set(self._num_waiting)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _rank_batch(self, asked: list[tuple[Query, str]]) -> list[RankedList]:
        rankers = [self._versions.get(version) for _, version in asked]
        answers: dict[int, RankedList] = {}
        for ranker in dict.fromkeys(rankers):
            places = [place for place, one in enumerate(rankers) if one is ranker]
            ranked = await self._run(ranker.rank, [asked[place][0] for place in places])
            answers.update(zip(places, ranked, strict=True))
        return [answers[place] for place in range(len(asked))]

    async def _run(
        self, rank: Callable[[list[Any]], list[RankedList]], queries: list[Any]
    ) -> list[RankedList]:
        async with self._turn:
            started = time.perf_counter()
            try:
                ranked = await asyncio.to_thread(rank, queries)
            except (RuntimeError, ArtifactError) as error:
                # The device failed or ran out of memory, or weights are no numbers.
                self._broken = error
                raise RankerUnavailableError(str(error)) from error
            self._metrics.batch_size.observe(len(queries))
            self._metrics.batch_seconds.observe(time.perf_counter() - started)
            return ranked


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


class ServeRanker:
    """`RankerClient` over a handle of Serve: what says that no replica answers becomes
    RankerUnavailableError, an error of the code stays what it is.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def rank(self, query: Query, version: str) -> RankedList:
        ranked: RankedList = await _call(lambda: self._handle.rank.remote(query, version))
        return ranked

    async def similar(self, query: SimilarQuery, version: str) -> RankedList:
        ranked: RankedList = await _call(lambda: self._handle.similar.remote(query, version))
        return ranked

    async def describe(self) -> RankerInfo:
        info: RankerInfo = await _call(lambda: self._handle.describe.remote())
        return info


class Ingress:
    """One process of the HTTP endpoint. Raises SettingsError and ArtifactError at its start."""

    def __init__(self, settings: Settings, ranker: DeploymentHandle) -> None:
        metrics = Metrics("ingress", ray_metrics)
        versions = Versions(
            settings.registry,
            partial(_load_model, metrics=metrics),
            pinned=settings.version,
            on_change=metrics.serve,
            on_failure=lambda version: metrics.model_failures.labels("ingress").inc(),
        )
        self._intake = open_intake(settings)
        seed = find_seed(settings.history_seed, settings.registry / versions.serving.champion)
        if seed is not None:
            load_seed(self._intake.history, seed)
        versions.watch(settings.registry_poll_s)
        self._settings = settings
        self._recommender = Recommender(
            versions,
            self._intake.history,
            ServeRanker(ranker),
            settings,
            metrics,
            shared_cache=open_shared_cache(settings),
            exposures=open_exposures(settings, metrics),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._recommender, self._intake, self._settings, echo_request_id=False)


def _load_model(folder: Path, metrics: Metrics) -> Model:
    model = Model.load(folder)
    if model.published_s is not None:
        metrics.model_published.labels(model.version).set(model.published_s)
    return model


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run` and Serve configurations; `args` are fields of `Settings`.

    Which version serves is read by the replicas themselves, at their start and every
    `registry_poll_s`. Raises: SettingsError for wrong settings; ArtifactError when none serves.
    """
    settings = Settings.from_environment(os.environ, args)
    if settings.version is None:
        read_serving(settings.registry)
    # One folder for the processes of a node, which is where their sums are read.
    environment = {"env_vars": {MULTIPROCESS_DIR: str(settings.metrics_dir)}}
    ranker = serve.deployment(
        RankerDeployment,
        name="Ranker",
        max_ongoing_requests=4 * settings.max_batch_size,
        # Beyond these a request is better answered by the next rung than late.
        max_queued_requests=4 * settings.max_batch_size,
        ray_actor_options={
            "num_cpus": settings.ranker_cpus,
            "num_gpus": settings.ranker_gpus,
            "runtime_env": environment,
        },
        autoscaling_config={
            "min_replicas": settings.min_rankers,
            "max_replicas": max(settings.min_rankers, settings.max_rankers),
            "target_ongoing_requests": settings.ranker_target_ongoing,
            "upscale_delay_s": settings.ranker_upscale_delay_s,
            "downscale_delay_s": settings.ranker_downscale_delay_s,
        },
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
    ).bind(settings)
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        # The gate inside sheds with 429 and a problem; Serve's own bound lies beyond it.
        max_ongoing_requests=2 * settings.max_in_flight,
        ray_actor_options={"runtime_env": environment},
    ).bind(settings, ranker)


async def _call(call: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await call()
    except RayTaskError as error:
        if isinstance(error.cause, RankerUnavailableError | RayServeException):
            raise RankerUnavailableError(str(error.cause)) from error
        raise
    except BackPressureError as error:
        raise RankerSaturatedError(str(error)) from error
    except (RayError, RayServeException) as error:
        raise RankerUnavailableError(str(error)) from error
