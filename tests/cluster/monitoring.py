"""What tests of monitoring share: what rules and dashboards ask for, and a real Prometheus."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.manifests import CLUSTER
from tests.ray_jobs.conftest import free_port

MONITORING = CLUSTER / "monitoring"
DASHBOARDS = sorted((MONITORING / "grafana/dashboards").glob("*.json"))
_START_S = 20.0


def alerts() -> dict[str, dict[str, Any]]:
    """The rules by their names."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def panels() -> list[dict[str, Any]]:
    """Every panel of every dashboard."""
    return [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]


def expressions() -> list[str]:
    """What rules and dashboards ask of Prometheus."""
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [rule["expr"] for rule in alerts().values()]


def named_metrics() -> set[str]:
    """Names of metrics of ours, of Ray's nodes and of Prometheus itself in all expressions."""
    return {
        name
        for expression in expressions()
        for name in re.findall(r"\b(?:nextitem_|ray_node_)\w+|\bup\b", expression)
    }


class Prometheus:
    """The HTTP interface of a server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def names(self) -> set[str]:
        """Of all metrics that were scraped so far."""
        return set(httpx.get(f"{self._url}/api/v1/label/__name__/values").json()["data"])

    def wait_for(self, names: set[str]) -> None:
        """Returns when all of them were scraped."""
        end = time.monotonic() + _START_S
        while missing := names - self.names():
            assert time.monotonic() < end, sorted(missing)
            time.sleep(0.2)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/-/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


@contextmanager
def running_prometheus(folder: Path, config: dict[str, Any]) -> Iterator[Prometheus]:
    """A server of its own with this configuration, ended by its process id."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    folder.mkdir()
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file", folder / "prometheus.yaml"]
    command += ["--storage.tsdb.path", folder / "data", "--web.listen-address", address]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(f"http://{address}")
        wait_until(server.is_ready, folder / "log")
        yield server
    finally:
        process.terminate()
        process.wait(30)


def wait_until(is_true: Any, log: Path) -> None:
    end = time.monotonic() + _START_S
    while not is_true():
        assert time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.2)
