"""Deploys the version that serves on the Ray cluster: the ingress and the ranker behind it.

    python -m ray_jobs.serve --config synthetic

The job ends when the endpoint is ready; the endpoint stays up with the cluster.
"""

import logging
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from ray_jobs.http_path import is_fast
from ray_jobs.job import Report, main
from ray_jobs.materialize import history_folder
from ray_jobs.sections.storage import expand
from recsys.artifact import load_artifact
from recsys.registry import serving_version

APPLICATION = "nextitem"
_READY_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


def run(config: PipelineConfig) -> Report:
    """Deploys and waits until a request would be answered. Raises: JobError, ArtifactError."""
    started = time.perf_counter()
    version = serving_version(Path(config.storage.registry_uri))
    client = ServeSubmissionClient(_dashboard_url())
    if not client.get_serve_details().get("applications"):
        refuse_taken_port(config)  # else it is taken by ourselves, and we update in place
    client.deploy_applications(serve_config(config))
    url = f"http://{config.serve.host}:{config.serve.port}"
    _wait_until_ready(client, url)
    return Report(
        "serve",
        f"{url} is ready",
        {
            "url": url,
            "version": version,
            "seconds_to_ready": time.perf_counter() - started,
            "http": _http_path(config),
        },
    )


def serve_config(config: PipelineConfig) -> dict[str, Any]:
    """The declarative Serve config (`ray.serve.schema.ServeDeploySchema`) of this data set."""
    registry = Path(config.storage.registry_uri)
    artifact = load_artifact(registry / serving_version(registry))
    history = history_folder(config, artifact.manifest["tables"]["sequences"])
    arguments: dict[str, Any] = {
        "registry": str(registry),
        "history_path": str(history.parent / "events.sqlite"),
        "deadline_ms": config.serve.deadline_ms,
        "events_landing": config.storage.landing_uri,
        "exposures": config.storage.exposures_uri,
        **_history_arguments(config),
        **config.serve.settings,
    }
    if history.exists() and config.serve.history == "sqlite":
        arguments["history_seed"] = str(history)
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": config.serve.host, "port": config.serve.port},
        # A line a request costs more than the request's way in; our metrics count them all.
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "serve_app.deployment:build",
                "args": arguments,
            }
        ],
    }


def _http_path(config: PipelineConfig) -> str:
    """The way in that is in use, and what to do when it is not the one that was asked for."""
    if is_fast():
        return "haproxy"
    if config.serve.http == "proxy":
        return "proxy"
    return "proxy, the slow one: this Ray was started without the variables of cluster/serve.env"


def _history_arguments(config: PipelineConfig) -> dict[str, str]:
    chosen = config.serve
    if chosen.history == "redis":
        assert chosen.redis_url is not None
        return {"history": "redis", "redis_url": chosen.redis_url}
    if chosen.history == "feast":
        assert chosen.feast_repo is not None
        return {"history": "feast", "feast_repo": expand(chosen.feast_repo)}
    return {}


def _dashboard_url() -> str:
    url = ray.init(ignore_reinit_error=True, logging_level=logging.WARNING).dashboard_url
    if not url:
        raise JobError(
            "The Ray cluster has no dashboard, which deploys applications; start it with one."
        )
    return f"http://{url}"


def refuse_taken_port(config: PipelineConfig) -> None:
    """Raises JobError when another program listens where the endpoint shall."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.serve.host, config.serve.port))
        except OSError as error:
            raise JobError(
                f"Port {config.serve.port} of {config.serve.host} cannot be used "
                f"({error.strerror}); choose another with --set serve.port=8001."
            ) from None


def _wait_until_ready(client: ServeSubmissionClient, url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        application = client.get_serve_details()["applications"].get(APPLICATION, {})
        if application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise JobError(f"The endpoint did not start: {application['message']}")
        if application.get("status") == "RUNNING" and _is_ready(url):
            return
        time.sleep(0.5)
    raise JobError(
        f"The endpoint was not ready after {_READY_TIMEOUT_S:.0f} s; see the Ray dashboard."
    )


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError as error:
        log.debug("not ready yet: %s", error)
        return False


if __name__ == "__main__":
    main(run, job="serve")
