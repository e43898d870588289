"""Jobs as people submit them: through Ray's Jobs API, with status and logs read back."""

import json
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.ray_jobs.conftest import TINY

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def client():
    context = ray.init(ignore_reinit_error=True)
    return JobSubmissionClient(f"http://{context.dashboard_url}")


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
    deadline = time.monotonic() + 120
    while not client.get_job_status(submission).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(submission)
        time.sleep(0.2)
    return client.get_job_status(submission), client.get_job_logs(submission)


def test_submitted_jobs_bring_events_into_the_lake(client, tmp_path):
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
