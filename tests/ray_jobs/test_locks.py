"""The lock of jobs of which only one at a time may run."""

import subprocess
import sys

import pytest

from ray_jobs.errors import JobError
from ray_jobs.locks import held

HOLDS = """
import pathlib, sys, time
from ray_jobs.locks import held

with held(pathlib.Path(sys.argv[1]), "retraining", "killed"):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_one_that_was_killed_is_free(tmp_path):
    lock = tmp_path / "retrains" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, lock], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "holds\n"
        said = rf"Another retraining is under way: killed, process {other.pid} on "
        with pytest.raises(JobError, match=said), held(lock, "retraining", "second"):
            pass
        other.kill()
    with held(lock, "retraining", "second"):
        assert "second" in lock.read_text()


def test_locks_of_two_folders_do_not_know_each_other(tmp_path):
    with (
        held(tmp_path / "a" / ".lock", "search", "a"),
        held(tmp_path / "b" / ".lock", "search", "b"),
    ):
        assert "b, process" in (tmp_path / "b" / ".lock").read_text()
