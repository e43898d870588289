"""Jobs as people submit them: to `ray start --head` through Ray's Jobs API, with status and logs
read back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.ray_jobs.conftest import TINY, free_port

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def client():
    """A client of a head node that is started for this module, all of its ports free ones."""
    dashboard, folder = free_port(), tempfile.mkdtemp(prefix="ray")
    ports = {
        "port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(),
        "runtime-env-agent-port": free_port(),
        "metrics-export-port": free_port(),
        "ray-client-server-port": free_port(),
    }
    options = [f"--{name}={port}" for name, port in ports.items()]
    ray = Path(sys.executable).with_name("ray")
    options += [f"--temp-dir={folder}", "--object-store-memory=300000000", "--disable-usage-stats"]
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=2", *options],
        start_new_session=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield _connect(f"http://127.0.0.1:{dashboard}", head)
    finally:
        # All that it started is of its session, so that nothing else on the machine is touched.
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _connect(address, head):
    deadline = time.monotonic() + 60
    while True:
        assert head.poll() is None, "ray start ended"
        try:
            # Jobs need the agent of a node, which comes a little after the dashboard.
            httpx.get(f"{address}/api/jobs/").raise_for_status()
            client = JobSubmissionClient(address)
            client.submit_job(entrypoint="true")
            return client
        except (httpx.HTTPError, ConnectionError, RuntimeError):
            assert time.monotonic() < deadline, "the head node takes no jobs"
            time.sleep(0.5)


def _submit(client, home, job, *overrides):
    """Runs a job to its end; returns its status and its log."""
    settings = " ".join(f"--set {override}" for override in (*TINY, *overrides))
    submission = client.submit_job(
        entrypoint=f"{sys.executable} -m ray_jobs.{job} --config synthetic {settings}",
        runtime_env={
            "working_dir": str(ROOT),
            "excludes": [".git", ".venv", "runs"],
            "env_vars": {"NEXTITEM_HOME": str(home)},
        },
    )
    deadline = time.monotonic() + 200
    while not client.get_job_status(submission).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(submission)
        time.sleep(0.2)
    return client.get_job_status(submission), client.get_job_logs(submission)


def test_submitted_jobs_bring_events_into_sequences(client, tmp_path):
    reports = {}
    for job in ("generate", "ingest", "build_sequences"):
        status, logs = _submit(client, tmp_path, job)
        assert status == JobStatus.SUCCEEDED, logs
        reports[job] = json.loads(logs.strip().splitlines()[-1])
    assert reports["ingest"]["committed"] == reports["build_sequences"]["events_read"] > 0


def test_a_job_that_cannot_run_fails_with_its_reason_as_last_line(client, tmp_path):
    status, logs = _submit(client, tmp_path, "train")
    assert status == JobStatus.FAILED
    assert "train failed: There is no table 'sequences'" in logs.strip().splitlines()[-1]


def test_a_wrong_setting_is_named_before_anything_starts(client, tmp_path):
    status, logs = _submit(client, tmp_path, "train", "train.epochs=3")
    assert status == JobStatus.FAILED
    assert "train.epochs" in logs.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_road_to_a_published_version_as_submitted_jobs(client, tmp_path, tiny_lake):
    tiny_lake(tmp_path)
    for job in ("train", "evaluate", "publish"):
        status, logs = _submit(client, tmp_path, job)
        assert status == JobStatus.SUCCEEDED, logs
    report = json.loads(logs.strip().splitlines()[-1])
    assert (Path(report["path"]) / "MANIFEST.json").exists()
