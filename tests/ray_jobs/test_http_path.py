"""The way in for requests: what Ray is told before it starts, and what then listens where."""

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest

from ray_jobs import http_path
from ray_jobs.demo import private_folder
from ray_jobs.http_path import _FILES, FAST, find_haproxy, free_ports, plan_http_path
from ray_jobs.sections.serving import ServeConfig
from serve_app.schemas import Problem

ROOT = Path(__file__).parents[2]
needs_haproxy = pytest.mark.skipif(find_haproxy() is None, reason="no HAProxy on this platform")
_RAY_CONFIG = """\
global
    maxconn 100
defaults
    mode http
    timeout client 5s
    timeout server 5s
    timeout connect 5s
    errorfile 503 /nowhere/500.http
frontend prometheus
    bind :{metrics}
    http-request return status 200
frontend http_frontend
    bind 127.0.0.1:{http}
    use_backend echo if {{ path /echo }}
    default_backend nobody
backend echo
    http-request return status 200 hdr Seen "%[req.hdr(x-request-id)]/%[req.hdr(x-session-id)]"
backend nobody
    server gone 127.0.0.1:{closed}
listen stats
  bind *:{stats}
  stats enable
"""
"""The parts of Ray's configuration that ours changes."""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program in HAProxy's place that prints its arguments."""
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o700)
    monkeypatch.setenv("NEXTITEM_HAPROXY", str(program))
    return program


@pytest.fixture
def started(tmp_path):
    """HAProxy as Ray would start it, on free ports; its address."""
    environment = plan_http_path(ServeConfig(), tmp_path).environment
    closed, port = free_ports("127.0.0.1", 2)
    config = tmp_path / "haproxy.cfg"
    ports = {
        name: environment[f"RAY_SERVE_HAPROXY_{name.upper()}_PORT"] for name in ("metrics", "stats")
    }
    config.write_text(_RAY_CONFIG.format(http=port, closed=closed, **ports))
    start = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    process = subprocess.Popen([start, "-db", "-f", config], env={**os.environ, **environment})
    url = f"http://127.0.0.1:{port}"
    _wait_for(port)
    yield url, process
    process.kill()
    process.wait()


def _wait_for(port):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            return socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.05)
    raise AssertionError("HAProxy did not start")


def test_the_slow_way_needs_nothing(tmp_path):
    path = plan_http_path(ServeConfig(http="proxy"), tmp_path)

    assert (path.environment, path.shortfall) == ({}, "")


def test_the_fast_way_is_the_default_and_takes_no_port_twice(tmp_path, program):
    environment = plan_http_path(ServeConfig(), tmp_path).environment

    ports = [value for name, value in environment.items() if name.endswith("_PORT")]
    assert environment.items() >= FAST.items()
    assert len(set(ports)) == 3
    assert not {"8404", "9101", "8500"} & set(ports)


def test_what_the_environment_sets_stays(tmp_path, program, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8404")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "4")

    environment = plan_http_path(ServeConfig(), tmp_path).environment

    assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"
    assert environment["RAY_SERVE_HAPROXY_NBTHREAD"] == "4"


def test_sockets_and_files_lie_in_the_private_folder(tmp_path, program):
    environment = plan_http_path(ServeConfig(), tmp_path).environment

    paths = [environment[name] for name in _FILES]
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)


def test_private_folder_is_short_and_ours():
    with private_folder() as folder:
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        # A node's id of 56 characters and "/admin.sock.1234567.tmp" must fit in 107.
        assert len(folder) + 1 + 56 + len("/admin.sock.1234567.tmp") <= 107


@needs_haproxy
def test_everything_listens_on_the_host_alone(started):
    _, process = started

    listening = {
        connection.laddr.ip
        for connection in psutil.Process(process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }

    assert listening == {"127.0.0.1"}


@needs_haproxy
def test_what_haproxy_answers_itself_is_a_problem(started):
    url, _ = started

    response = httpx.post(f"{url}/v1/recommend", json={})

    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Retry-After"] == "1"
    assert Problem.model_validate(response.json()).status == 503


@needs_haproxy
@pytest.mark.parametrize(
    ("given", "seen"),
    [(b"page-7:a.b", "page-7:a.b"), (b"\xff\xfe", ""), (b"a b", ""), (b"x" * 129, "")],
)
def test_headers_that_are_not_for_clients_are_dropped(started, given, seen):
    url, _ = started

    response = httpx.get(f"{url}/echo", headers={b"X-Request-ID": given, b"X-Session-ID": b"1"})

    assert response.headers["Seen"] == f"{seen}/"


def test_the_program_gets_the_arguments_that_ray_gives(tmp_path, program):
    environment = plan_http_path(ServeConfig(), tmp_path).environment
    config = tmp_path / "haproxy.cfg"
    config.write_text(_RAY_CONFIG)

    printed = subprocess.check_output(
        [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", config, "-dR", "-sf", "7"],
        env={**os.environ, **environment},
        text=True,
    )

    assert printed == f"-db -f {config} -dR -sf 7\n"
    assert "timeout connect 250ms" in config.read_text()


def test_a_platform_without_haproxy_says_so_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(http_path, "find_haproxy", lambda: None)

    path = plan_http_path(ServeConfig(), tmp_path)

    assert path.environment == {}
    assert "slower proxy in Python" in path.shortfall
    assert "serve.http=proxy" in path.shortfall


def test_a_program_that_is_set_comes_first(program):
    assert find_haproxy() == str(program)


def test_free_ports_can_be_bound():
    ports = free_ports("127.0.0.1", 3)

    assert len(set(ports)) == 3
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_the_cluster_is_told_the_same():
    lines = (ROOT / "cluster/serve.env").read_text().splitlines()

    settings = dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    assert settings == FAST
