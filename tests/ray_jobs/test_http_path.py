"""The way in for requests: what Ray is told before it starts, and what then listens where."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import http_path
from ray_jobs.config import ServeConfig
from ray_jobs.demo import private_folder
from ray_jobs.http_path import FAST, find_haproxy, free_ports, plan_http_path
from tests.ray_jobs.conftest import free_port

ROOT = Path(__file__).parents[2]
_RAY_CONFIG = """
frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind 127.0.0.1:{http}
listen stats
  bind *:{stats}
"""


@pytest.fixture
def haproxy(tmp_path, monkeypatch):
    """A program in HAProxy's place that prints its arguments."""
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o700)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(program))
    return program


def test_the_slow_way_needs_nothing(tmp_path):
    path = plan_http_path(ServeConfig(http="proxy"), tmp_path)

    assert (path.environment, path.shortfall) == ({}, "")


def test_the_fast_way_is_the_default_and_takes_no_port_twice(tmp_path, haproxy):
    environment = plan_http_path(ServeConfig(), tmp_path).environment

    ports = [value for name, value in environment.items() if name.endswith("_PORT")]
    assert environment.items() >= FAST.items()
    assert len(set(ports)) == 3
    assert not {"8404", "9101", "8500"} & set(ports)


def test_what_the_environment_sets_stays(tmp_path, haproxy, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8404")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "4")

    environment = plan_http_path(ServeConfig(), tmp_path).environment

    assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"
    assert environment["RAY_SERVE_HAPROXY_NBTHREAD"] == "4"
    assert "8404" in Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"]).read_text()


def test_sockets_and_files_lie_in_the_private_folder(tmp_path, haproxy):
    environment = plan_http_path(ServeConfig(), tmp_path).environment

    paths = [value for value in environment.values() if value.startswith("/")]
    assert len(paths) == 6
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)


def test_private_folder_is_short_and_ours():
    with private_folder() as folder:
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        # A node's id of 56 characters and "/admin.sock.1234567.tmp" must fit in 107.
        assert len(folder) + 1 + 56 + len("/admin.sock.1234567.tmp") <= 107


def test_statistics_and_exporter_are_bound_to_the_host_alone(tmp_path, haproxy):
    environment = plan_http_path(ServeConfig(), tmp_path).environment
    config = tmp_path / "haproxy.cfg"
    metrics, stats = (
        environment[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("METRICS", "STATS")
    )
    config.write_text(_RAY_CONFIG.format(metrics=metrics, http=8000, stats=stats))

    start = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    printed = subprocess.check_output([start, "-db", "-f", str(config), "-dR"], text=True)

    assert printed == f"-db -f {config} -dR\n"
    assert re.findall("bind (.+)", config.read_text()) == [
        f"127.0.0.1:{metrics}",
        "127.0.0.1:8000",
        f"127.0.0.1:{stats}",
    ]


def test_a_platform_without_haproxy_says_so_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(http_path, "find_haproxy", lambda: None)

    path = plan_http_path(ServeConfig(), tmp_path)

    assert path.environment == {}
    assert "slower proxy in Python" in path.shortfall
    assert "serve.http=proxy" in path.shortfall


def test_a_program_that_is_set_comes_first(haproxy):
    assert find_haproxy() == str(haproxy)


def test_free_ports_can_be_bound():
    ports = free_ports("127.0.0.1", 3)

    assert len(set(ports)) == 3
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_the_cluster_is_told_the_same():
    lines = (ROOT / "cluster/serve.env").read_text().splitlines()

    settings = dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    assert settings == FAST


_SERVED = """
import json, sys, urllib.request
from pathlib import Path
import psutil, ray
from fastapi import FastAPI
from ray_jobs.config import ServeConfig
from ray_jobs.demo import private_folder, start_ray
from ray_jobs.http_path import is_fast

config = ServeConfig(port=int(sys.argv[1]))
with private_folder() as folder:
    start_ray(config, Path(folder))
    from ray import serve
    app = FastAPI()
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(serve.deployment(serve.ingress(app)(type("Empty", (), {}))).bind())
    urllib.request.urlopen(f"http://127.0.0.1:{config.port}/openapi.json").close()
    listening = {
        str(connection.laddr.ip)
        for process in psutil.process_iter()
        if process.name() == "haproxy"
        for connection in process.net_connections()
        if connection.status == "LISTEN" and folder in " ".join(process.cmdline())
    }
    print(json.dumps({"fast": is_fast(), "listening": sorted(listening)}))
    ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_haproxy() is None, reason="no HAProxy on this platform")
def test_two_demos_serve_side_by_side_and_haproxy_stays_on_the_loopback():
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    demos = [
        subprocess.Popen(
            [sys.executable, "-c", _SERVED, str(free_port())],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        printed = [demo.communicate(timeout=200)[0].splitlines()[-1] for demo in demos]
    finally:
        for demo in demos:
            demo.kill()

    assert printed == ['{"fast": true, "listening": ["127.0.0.1"]}'] * 2
