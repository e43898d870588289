"""Processes that are killed amid an ingest or a build: no event is lost, none is there twice."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_lake.storage import open_file
from data_lake.tables import files_by_bucket, open_table, read_table
from ray_jobs import build_sequences, ingest
from ray_jobs.job import load_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NUM_FILES = 12
NUM_EVENTS = 20_000
"""In each file; with as many lines again that repeat the half of them, and a bad one."""
NUM_READ = NUM_FILES * (NUM_EVENTS + NUM_EVENTS // 2 + 1)
COUNTS = (NUM_READ, NUM_FILES * NUM_EVENTS, NUM_FILES * NUM_EVENTS // 2, NUM_FILES)
CONFIG = """
name = "toy"
storage = {{ root = "{shop}" }}
[ingest]
num_buckets = 48
[[ingest.events]]
path = "{shop}/events"
format = "csv"
[ingest.events.columns]
event_id = "id"
user_id = "user"
item_id = "item"
event_type = "type"
timestamp = "at"
"""


@pytest.fixture
def shop(tmp_path):
    """A delivery that takes an ingest some seconds."""
    (tmp_path / "events").mkdir()
    for file in range(NUM_FILES):
        lines = [
            f"{file}-{n},u{n % 997},i{n % 101},view,{1_700_000_000_000_000 + n}"
            for n in [*range(NUM_EVENTS), *range(NUM_EVENTS // 2)]
        ]
        content = "\n".join(["id,user,item,type,at", *lines, "bad,,i,view,1", ""])
        (tmp_path / "events" / f"{file:02}.csv").write_text(content)
    (tmp_path / "toy.toml").write_text(CONFIG.format(shop=tmp_path))
    return tmp_path


def check_whole(shop):
    """Each event once, each bad row once, and nothing of a table that a reader cannot open."""
    events = read_table(open_table(str(shop / "lake"), "events"), ["event_id"])
    assert events.num_rows == NUM_FILES * NUM_EVENTS
    assert len(events["event_id"].unique()) == NUM_FILES * NUM_EVENTS
    assert read_table(open_table(str(shop / "lake"), "quarantine")).num_rows == NUM_FILES


def contents(shop):
    """sha256 of each bucket's sequences; a file a bucket, or else rows would be there twice."""
    files = files_by_bucket(open_table(str(shop / "lake"), "sequences"))
    assert all(len(of_bucket) == 1 for of_bucket in files.values())
    return {
        bucket: hashlib.sha256(open_file(file).read()).hexdigest()
        for bucket, (file,) in files.items()
    }


def counts(figures):
    return tuple(figures[name] for name in ("read", "committed", "duplicate", "quarantined"))


def descendants(ancestor: int) -> Iterator[tuple[int, str]]:
    """Process ids and titles of all processes below one."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
                parents[int(folder.name)] = int(status[1])
            except OSError:
                continue  # it has just ended
    for process in parents:
        above = process
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor and process != ancestor:
            yield process, titles[process]


def kill_when(find: Callable[[], int | None]) -> threading.Thread:
    """Kills the process that `find` names, once, as soon as it names one."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            victim = find()
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill_worker(task: str) -> threading.Thread:
    """Kills the first worker that is seen at this task."""

    def find_worker() -> int | None:
        return next(
            (pid for pid, title in descendants(os.getpid()) if title.startswith(task)), None
        )

    return kill_when(find_worker)


@pytest.mark.parametrize("task", ["ray::_load_pieces", "ray::merge_pieces"])
def test_a_worker_that_is_killed_amid_a_task_is_replaced(shop, ray_cluster, task):
    killer = kill_worker(task)
    report = ingest.run(load_config(str(shop / "toy.toml")))
    killer.join(timeout=1)
    assert not killer.is_alive(), "no worker was found"
    assert counts(report.figures) == COUNTS
    check_whole(shop)


@pytest.fixture
def whole(shop, ray_cluster):
    """The sequences of an unbroken build, in whose place another one may come."""
    config = load_config(str(shop / "toy.toml"))
    ingest.run(config)
    build_sequences.run(config)
    expected = contents(shop)
    shutil.rmtree(shop / "lake" / "sequences")
    return expected


def test_a_worker_that_is_killed_amid_a_build_is_replaced(shop, whole):
    killer = kill_worker("ray::MapBatches(work)")
    build_sequences.run(load_config(str(shop / "toy.toml")))
    killer.join(timeout=1)
    assert not killer.is_alive(), "no worker was found"
    assert contents(shop) == whole


NODE_DIES = """
import importlib, os, signal, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from ray_jobs.job import load_config

job = importlib.import_module(f"ray_jobs.{sys.argv[3]}")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
raylet = cluster.add_node(num_cpus=2).all_processes["raylet"][0].process.pid
ray.init(address=cluster.address)

def titles_of_workers():
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[1]
            if int(parent) == raylet:
                yield open(f"/proc/{process}/cmdline").read()
        except OSError:
            continue

def run():
    print(job.run(load_config(sys.argv[1])).json_line(), flush=True)

running = threading.Thread(target=run)
running.start()
while running.is_alive() and not any(map(lambda title: sys.argv[2] in title, titles_of_workers())):
    time.sleep(0.002)
os.kill(raylet, signal.SIGKILL)
print("killed", flush=True)
cluster.add_node(num_cpus=2)
running.join()
ray.shutdown()
cluster.shutdown()
"""
QUICK_TO_NOTICE = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_initial_delay_ms": "0",
}


def lose_node(shop, job, task):
    """Runs a job on a node that is killed during the task, and then on another; its report."""
    done = subprocess.run(
        [sys.executable, "-c", NODE_DIES, str(shop / "toy.toml"), task, job],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", **QUICK_TO_NOTICE},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    # The node went first, and all that it held had to be made again.
    killed, report = (line for line in done.stdout.splitlines() if line.startswith(("killed", "{")))
    assert killed == "killed"
    return json.loads(report)


@pytest.mark.parametrize("task", ["ray::_load_pieces", "ray::merge_pieces"])
def test_a_node_that_is_lost_costs_no_event(shop, task):
    assert counts(lose_node(shop, "ingest", task)) == COUNTS
    check_whole(shop)


def test_a_node_that_is_lost_amid_a_build_costs_no_sequence(shop, whole):
    lose_node(shop, "build_sequences", "ray::MapBatches(work)")
    assert contents(shop) == whole


def kill_driver(shop, job, table):
    """Starts a job, and kills it once it has written what no commit knows yet."""
    driver = subprocess.Popen(command(shop, job), cwd=ROOT, stderr=subprocess.DEVNULL)

    def is_writing() -> int | None:
        return driver.pid if any((shop / "lake" / table).rglob("*.parquet")) else None

    kill_when(is_writing).join(timeout=120)
    assert driver.wait(timeout=60) == -signal.SIGKILL


def run_again(shop, job):
    """The report of a run that nothing disturbs."""
    done = subprocess.run(
        command(shop, job), cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def command(shop, job):
    return [sys.executable, "-m", f"ray_jobs.{job}", "--config", str(shop / "toy.toml")]


@pytest.mark.parametrize("table", ["quarantine", "events"])
def test_a_driver_that_is_killed_leaves_a_lake_that_the_next_run_completes(shop, table):
    kill_driver(shop, "ingest", table)
    for name in ("events", "quarantine"):
        assert open_table(str(shop / "lake"), name).version() == 0
    assert counts(run_again(shop, "ingest")) == COUNTS
    check_whole(shop)


def test_a_driver_that_is_killed_amid_a_build_leaves_what_the_next_one_completes(shop, whole):
    kill_driver(shop, "build_sequences", "sequences")
    assert open_table(str(shop / "lake"), "sequences").version() == 0
    run_again(shop, "build_sequences")
    assert contents(shop) == whole
