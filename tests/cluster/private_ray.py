"""A Ray of several nodes on this machine, started by the commands of a cluster: its control store
lies in Redis, its head has no CPUs, and nodes are ended by their process ids.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from ray_jobs.http_path import free_ports, plan_http_path
from ray_jobs.sections.serving import ServeConfig

_PATIENCE_S = 60.0
_HOST = "127.0.0.1"
_RAY = Path(sys.executable).with_name("ray")
# A dead node is noticed within two seconds instead of fifteen.
_NOTICED_SOON = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_initial_delay_ms": "0",
}


class PrivateRay:
    """Args:
    folder: where everything of it lies; its path must be short.
    redis: host:port of the Redis that outlives the head.
    """

    def __init__(self, folder: Path, redis: str) -> None:
        self._folder = folder
        ports = free_ports(_HOST, 4)
        self._port, self._dashboard_port, self._agent_port, self.http_port = ports
        path = plan_http_path(ServeConfig(port=self.http_port), folder)
        assert not path.shortfall, path.shortfall
        kept = {name: text for name, text in os.environ.items() if "RAY_SERVE" not in name}
        self.environment = {
            **kept,
            **path.environment,
            **_NOTICED_SOON,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_REDIS_ADDRESS": redis,
            "RAY_external_storage_namespace": "nextitem",
        }
        self._nodes: dict[str, psutil.Popen] = {}

    @property
    def address(self) -> str:
        return f"{_HOST}:{self._port}"

    @property
    def dashboard(self) -> str:
        return f"http://{_HOST}:{self._dashboard_port}"

    @property
    def url(self) -> str:
        """Of HAProxy, which lives on the head."""
        return f"http://{_HOST}:{self.http_port}"

    def start_head(self) -> None:
        """A head like that of the manifests: nothing but the control of the others."""
        # On one machine Ray takes what its workers say of the last head for a head that runs.
        (self._folder / "ray/ray_current_cluster").unlink(missing_ok=True)
        options = [f"--port={self._port}", "--head", "--num-cpus=0"]
        options += [f"--dashboard-host={_HOST}", f"--dashboard-port={self._dashboard_port}"]
        self._start("head", *options, f"--temp-dir={self._folder / 'ray'}")
        wait_until(self._has_dashboard)

    def start_worker(self, name: str, cpus: int = 3) -> None:
        """A node whose resource `name` tells it from others."""
        resources = f'--resources={{"{name}": 1}}'
        self._start(name, f"--address={self.address}", f"--num-cpus={cpus}", resources)
        wait_until(lambda: self._node_id(name) is not None)

    def kill(self, name: str) -> None:
        """Every process of a node at once, as when its machine is lost."""
        node = self._nodes.pop(name)
        processes = [*node.children(recursive=True), node]
        for process in processes:
            kill_if_alive(process)
        psutil.wait_procs(processes, 20)

    def drain(self, name: str, seconds: int) -> None:
        """Tells Ray that a worker is taken away in so many seconds."""
        command = [_RAY, "drain-node", "--address", self.address]
        command += ["--node-id", self._node_id(name), "--reason-message", "maintenance"]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=self.environment, check=True, timeout=60)

    def deploy(self, arguments: dict[str, Any]) -> None:
        """The endpoint, as a configuration of Serve; returns when it is ready."""
        application = {
            "name": "nextitem",
            "route_prefix": "/",
            "import_path": "serve_app.deployment:build",
            "args": arguments,
        }
        ServeSubmissionClient(self.dashboard).deploy_applications(
            {
                "proxy_location": "HeadOnly",
                "http_options": {"host": _HOST, "port": self.http_port},
                "logging_config": {"enable_access_log": False},
                "applications": [application],
            }
        )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        wait_until(lambda: answers(f"{self.url}/health/ready"))

    def replicas(self, deployment: str) -> dict[int, str]:
        """Pids of the replicas of a deployment, and their nodes."""
        return {
            process.pid: name
            for name, node in self._nodes.items()
            for process in node.children(recursive=True)
            if is_replica(process, deployment)
        }

    def direct_url(self) -> str:
        """Of an ingress replica itself, behind HAProxy."""
        ports = [
            connection.laddr.port
            for pid in self.replicas("Ingress")
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and 30_000 <= connection.laddr.port < 31_000
        ]
        return f"http://{_HOST}:{min(ports)}"

    def close(self) -> None:
        for name in list(self._nodes):
            self.kill(name)

    def _start(self, name: str, *options: str) -> None:
        command = [_RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={_HOST}"]
        command += ["--object-store-memory=100000000", "--dashboard-agent-listen-port=0", *options]
        with (self._folder / f"{name}.log").open("a") as log:
            self._nodes[name] = psutil.Popen(
                command, env=self.environment, cwd=self._folder, stdout=log, stderr=log
            )

    def _has_dashboard(self) -> bool:
        return answers(f"{self.dashboard}/api/gcs_healthz")

    def _node_id(self, name: str) -> str | None:
        found = httpx.get(f"{self.dashboard}/api/v0/nodes?detail=1", timeout=20).json()
        for node in found["data"]["result"]["result"]:
            if name in (node["resources_total"] or {}) and node["state"] == "ALIVE":
                return str(node["node_id"])
        return None


def wait_until(is_true: Callable[[], bool], patience_s: float = _PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not is_true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def is_replica(process: psutil.Process, deployment: str) -> bool:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::ServeReplica") and f":{deployment}" in title


def kill_if_alive(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return
