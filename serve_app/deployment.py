"""Ray Serve: rankers that answer in dynamic batches, behind ingresses with the FastAPI app.

serve run serve_app.deployment:build registry=/srv/registry history_path=/srv/history.sqlite
"""

import logging
import os
from collections.abc import Awaitable, Callable
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

from recsys.queries import Query
from recsys.ranker import RankedList, RankerInfo, SimilarQuery
from recsys.registry import read_serving
from serve_app.api import create_app
from serve_app.errors import RankerSaturatedError, RankerUnavailableError
from serve_app.exposures import open_exposures
from serve_app.history_stores.seeds import find_seed, load_seed
from serve_app.intake import open_intake
from serve_app.metrics import MULTIPROCESS_DIR, Metrics
from serve_app.model import Model
from serve_app.ranker_host import RankerHost
from serve_app.recommender import Recommender
from serve_app.settings import Settings
from serve_app.shared_cache import open_shared_cache
from serve_app.versions import Versions

log = logging.getLogger(__name__)


class RankerDeployment(RankerHost):
    """Rankers behind a handle of Serve. Serve sends the first request when they are warm."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Metrics("ranker", ray_metrics))


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
    """One process of the HTTP endpoint, with a ranker of its own where it is given none.

    Raises: SettingsError and ArtifactError at its start.
    """

    def __init__(self, settings: Settings, ranker: DeploymentHandle | None) -> None:
        metrics = Metrics("ingress", ray_metrics)
        versions = Versions(
            settings.registry,
            partial(_load_model, metrics=metrics),
            pinned=settings.version,
            on_change=metrics.serve,
            on_failure=lambda version: metrics.model_failures.labels("ingress").inc(),
        )
        self._host = RankerHost(settings, metrics) if ranker is None else None
        self._intake = open_intake(settings, metrics.show_backlog)
        seed = find_seed(settings.history_seed, settings.registry / versions.serving.champion)
        if seed is not None:
            load_seed(self._intake.history, seed)
        versions.watch(settings.registry_poll_s)
        self._settings = settings
        self._recommender = Recommender(
            versions,
            self._intake.history,
            self._host or ServeRanker(ranker),
            settings,
            metrics,
            shared_cache=open_shared_cache(settings),
            exposures=open_exposures(settings, metrics),
        )

    async def check_health(self) -> None:
        """Raises what broke the ranker inside.

        Serve asks each replica for its health from its start on; a probe of `/health/ready` reaches
        any of them. So each finds the way to the ranker before a visitor has to wait for that.
        """
        if self._host is not None:
            self._host.check_health()
        try:
            await self._recommender.is_ready()
        except Exception:  # whatever the ranker suffers from, this process answers from the ladder
            log.warning("The way to the ranker is not warm.", exc_info=True)

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
    is_inside = settings.ranker == "inside"
    options = {"num_cpus": settings.ranker_cpus, "num_gpus": settings.ranker_gpus}
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        # The gate inside sheds with 429 and a problem; Serve's own bound lies beyond it.
        max_ongoing_requests=2 * settings.max_in_flight,
        health_check_period_s=2,
        ray_actor_options={"runtime_env": environment, **(options if is_inside else {})},
    ).bind(settings, None if is_inside else _bind_ranker(settings, options, environment))


def _bind_ranker(
    settings: Settings, options: dict[str, Any], environment: dict[str, Any]
) -> Application:
    return serve.deployment(
        RankerDeployment,
        name="Ranker",
        max_ongoing_requests=4 * settings.max_batch_size,
        # Beyond these a request is better answered by the next rung than late.
        max_queued_requests=4 * settings.max_batch_size,
        ray_actor_options={**options, "runtime_env": environment},
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


async def _call(call: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await call()
    except RayTaskError as error:
        if isinstance(error.cause, RankerSaturatedError):
            raise RankerSaturatedError(str(error.cause)) from error
        if isinstance(error.cause, RankerUnavailableError | RayServeException):
            raise RankerUnavailableError(str(error.cause)) from error
        raise
    except BackPressureError as error:
        raise RankerSaturatedError(str(error)) from error
    except (RayError, RayServeException) as error:
        raise RankerUnavailableError(str(error)) from error
