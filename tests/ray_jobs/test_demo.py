"""The demo: what it refuses at the start, and how it ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import demo
from ray_jobs.errors import JobError
from ray_jobs.http_checks import Check
from ray_jobs.http_path import find_haproxy
from ray_jobs.job import Report
from ray_jobs.sections.serving import ServeConfig
from ray_jobs.serve import refuse_taken_port
from tests.ray_jobs.conftest import TINY, free_port, tiny_config

ROOT = Path(__file__).parents[2]


def test_a_port_in_use_is_refused_with_the_way_out(tmp_path):
    config = tiny_config(tmp_path)
    taken = socket.create_server(("127.0.0.1", config.serve.port))
    message = r"cannot be used \(Address already in use\); choose"
    with taken, pytest.raises(JobError, match=message):
        refuse_taken_port(config)
    refuse_taken_port(config)


def test_too_little_memory_for_the_object_store_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "free_memory_bytes", lambda: 500_000_000)
    with pytest.raises(JobError, match=r"needs 4 GB of free memory.*this machine has 0\.5"):
        demo.start_ray(ServeConfig(), tmp_path)


def test_a_model_that_loses_and_a_failed_check_both_count():
    report = Report("evaluate", "", {"beats_all_baselines": False})
    checks = [Check("a list comes", True, "10"), Check("it is in time", False, "900 ms")]
    assert demo._shortfalls({"evaluate": report}, checks) == [
        "the model does not beat every baseline on NDCG@10",
        "it is in time: 900 ms",
    ]


@pytest.mark.parametrize(("shortfalls", "status"), [([], 0), (["too late"], 1)])
def test_exit_tells_whether_something_fell_short(shortfalls, status, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.wait_or_exit(True, shortfalls)
    assert caught.value.code == status
    assert ("FELL SHORT: too late" in capsys.readouterr().out) == bool(shortfalls)


def test_a_wrong_setting_ends_the_demo_before_ray_starts(capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main(["--set", "train.trainer.epochs=3"])
    assert caught.value.code == 2
    assert "train.trainer.epochs" in capsys.readouterr().err.splitlines()[-1]


_NEIGHBOUR = """
import json, sys, urllib.request
from pathlib import Path
import psutil, ray
from fastapi import FastAPI
from ray_jobs.sections.serving import ServeConfig
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
    print(json.dumps({"fast": is_fast(), "listening": sorted(listening)}), flush=True)
    sys.stdin.read()
    urllib.request.urlopen(f"http://127.0.0.1:{config.port}/openapi.json").close()
    ray.shutdown()
"""


@pytest.fixture
def neighbour():
    """Another demo on this machine: its process and what it said when it served."""
    process = subprocess.Popen(
        [sys.executable, "-c", _NEIGHBOUR, str(free_port())],
        env={**_environment(), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process, next(line.strip() for line in process.stdout if line.startswith("{"))
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(find_haproxy() is None, reason="no HAProxy on this platform")
def test_the_whole_demo_ends_with_a_table_a_verdict_and_its_exit_status(tmp_path, neighbour):
    settings = [word for override in TINY for word in ("--set", override)]
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.demo", "--exit", "--port", str(free_port()), *settings],
        cwd=ROOT,
        env={**_environment(), "NEXTITEM_HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    # Two epochs do not beat every baseline, and the demo says so instead of hiding it.
    assert "model, time-blind" in done.stdout, done.stderr
    assert "curl -s http://127.0.0.1:" in done.stdout
    fell_short = [line for line in done.stdout.splitlines() if line.startswith("FELL SHORT")]
    assert done.returncode == (1 if fell_short else 0)
    assert "NOT  " not in done.stdout.partition("Real requests")[2].partition("|")[0]

    # Both served at the same time, each on the loopback alone, and neither took the other's place.
    process, printed = neighbour
    process.communicate(timeout=100)
    assert printed == '{"fast": true, "listening": ["127.0.0.1"]}'
    assert process.returncode == 0


def _environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
