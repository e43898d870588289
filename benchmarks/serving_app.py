"""One endpoint to put load on, in a process of its own that ends with its standard input.

    with Endpoint("haproxy", registry) as endpoint:
        run_load(Plan(endpoint.url, ...))

Ways of serving: `haproxy`, `proxy`, `grpc` and `direct` are the whole stack on a Ray of its own, by
another road from the port to the ingress each, and the ranker is a deployment of its own; `inside`
is `haproxy` with the ranker inside the ingress; `bare` is the same model in the same ONNX Runtime,
called by an endpoint of four lines under uvicorn.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal, Self, get_args

import httpx

Way = Literal["inside", "haproxy", "proxy", "grpc", "direct", "bare"]
WAYS: tuple[Way, ...] = get_args(Way)
_ROOT = Path(__file__).parents[1]
_HOST = "127.0.0.1"
_READY_TIMEOUT_S = 300.0
_ENVIRONMENTS = {
    # Their own is planned, with free ports.
    "inside": {},
    "haproxy": {},
    "proxy": {},
    "grpc": {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", "RAY_SERVE_PROXY_USE_GRPC": "1"},
    "direct": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_PROXY_USE_GRPC": "1"},
}
"""Variables of Ray by way, instead of what the caller's environment says of Serve."""


class Endpoint(AbstractContextManager["Endpoint"]):
    """An endpoint that is up within the block; `settings` are fields of `serve_app.settings`."""

    def __init__(self, way: Way, registry: Path, **settings: Any) -> None:
        self._command = [sys.executable, "-m", "benchmarks.serving_app", way, str(registry)]
        self._command += ["--settings", json.dumps(settings)]
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RAY_SERVE_") and name != "OMP_NUM_THREADS"
        } | _ENVIRONMENTS.get(way, {})
        if way == "bare":
            # As many as Ray gives the ranker.
            threads = max(1, int(settings.get("ranker_cpus", 1)))
            self._environment["OMP_NUM_THREADS"] = str(threads)
        self.url = ""
        self.seconds_to_ready = 0.0
        """From the call that deploys, on a Ray that is up, to the first request that is taken."""

    def __enter__(self) -> Self:
        """Raises: ChildProcessError when it does not start."""
        self._process = subprocess.Popen(
            self._command,
            cwd=_ROOT,
            env=self._environment | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = self._ask()
        self.url, self.seconds_to_ready = found["url"], found["seconds_to_ready"]
        return self

    def restart_ranker(self) -> float:
        """Kills the ranker; seconds until another one ranks in its place."""
        return float(self._ask("restart")["seconds"])

    def __exit__(self, *error: object) -> None:
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _ask(self, command: str = "") -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if command:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise ChildProcessError(f"The endpoint did not start: {' '.join(self._command)}")


def main() -> None:
    """Serves until standard input ends; the only lines of JSON are answers to the caller."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("registry", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    arguments = parser.parse_args()
    with ExitStack() as stack:
        if arguments.way == "bare":
            serve_bare(arguments.registry, stack)
        else:
            serve_stack(arguments.way, arguments.registry, arguments.settings, stack)


def serve_stack(way: Way, registry: Path, settings: dict[str, Any], stack: ExitStack) -> None:
    """The whole stack on a Ray of its own."""
    from ray_jobs.http_path import free_ports, plan_http_path
    from ray_jobs.sections.serving import ServeConfig

    (port,) = free_ports(_HOST, 1)
    folder = tempfile.TemporaryDirectory(prefix="load-", dir="/tmp", ignore_cleanup_errors=True)
    private = Path(stack.enter_context(folder))
    if way in ("inside", "haproxy"):
        path = plan_http_path(ServeConfig(host=_HOST, port=port), private)
        if path.shortfall:
            raise SystemExit(path.shortfall)
        os.environ.update(path.environment)

    # Ray reads the environment when it is imported.
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from serve_app.deployment import build

    ray.init(
        num_cpus=max(4, os.cpu_count() or 4),
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    stack.callback(ray.shutdown)
    history = {"history_path": str(private / "history.sqlite")}
    placement = {"ranker": "inside"} if way == "inside" else {}
    application = build({"registry": str(registry), **history, **placement, **settings})
    # Both are Ray's words about what it starts; the figures are told by our own.
    quiet = LoggingConfig(enable_access_log=False, log_level="ERROR")
    started = time.perf_counter()
    serve.start(http_options={"host": _HOST, "port": port}, logging_config=quiet)
    serve.run(application, logging_config=quiet)
    url = f"http://{_HOST}:{_direct_port() if way == 'direct' else port}"
    _wait_until_ready(url)
    _answer(url=f"{url}/v1/recommend", seconds_to_ready=time.perf_counter() - started)
    for _ in sys.stdin:
        _answer(seconds=_restart_ranker(url))


def serve_bare(registry: Path, stack: ExitStack) -> None:
    """The same ranker in an app that does nothing else."""
    import uvicorn
    from fastapi import FastAPI

    from ray_jobs.http_path import free_ports
    from recsys.artifact import load_artifact
    from recsys.queries import Event, Query
    from recsys.ranker import Ranker
    from recsys.registry import serving_version

    started = time.perf_counter()
    ranker = Ranker(load_artifact(registry / serving_version(registry)), backend="onnx")
    ranker.warm_up()
    app = FastAPI()

    @app.post("/v1/recommend")
    async def recommend(body: dict[str, Any]) -> dict[str, Any]:
        (ranked,) = ranker.rank([Query(tuple(map(Event, body["user_history"])), k=body["top_k"])])
        pairs = zip(ranked.item_ids, ranked.scores, strict=True)
        return {"recommendations": [{"item_id": item, "score": score} for item, score in pairs]}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    (port,) = free_ports(_HOST, 1)
    config = uvicorn.Config(app, host=_HOST, port=port, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    stack.callback(setattr, server, "should_exit", True)
    threading.Thread(target=server.run, daemon=True).start()
    _wait_until_ready(f"http://{_HOST}:{port}")
    _answer(
        url=f"http://{_HOST}:{port}/v1/recommend", seconds_to_ready=time.perf_counter() - started
    )
    sys.stdin.read()


def _direct_port() -> int:
    """Where the one ingress replica listens by itself."""
    import psutil

    replicas = [
        connection.laddr.port
        for process in psutil.process_iter()
        if process.name().startswith("ray::ServeRepl")
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == _HOST
    ]
    return min(replicas)


def _wait_until_ready(url: str) -> None:
    end = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health/ready", timeout=10).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.02)
    raise SystemExit(f"{url} was not ready after {_READY_TIMEOUT_S:.0f} s.")


def _restart_ranker(url: str) -> float:
    from ray_jobs.http_checks import kill_replicas

    assert kill_replicas("Ranker")
    started = time.perf_counter()
    with httpx.Client(base_url=url, timeout=30) as client:
        number = 0
        source = ""
        while source != "model":
            body = {"user_history": [number % 3000, number // 3000], "timeout_ms": 70}
            source = client.post("/v1/recommend", json=body).json()["source"]
            number += 1
            time.sleep(0.05)
    return time.perf_counter() - started


def _answer(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
