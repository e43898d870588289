"""Processes that are killed amid an ingest: no event is lost, and none is there twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_lake.tables import open_table, read_table
from ray_jobs import ingest
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
num_buckets = 8
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


@pytest.mark.parametrize("task", ["ray::_load_pieces", "ray::merge_pieces"])
def test_a_worker_that_is_killed_amid_a_task_is_replaced(shop, ray_cluster, task):
    def find_worker() -> int | None:
        return next(
            (pid for pid, title in descendants(os.getpid()) if title.startswith(task)), None
        )

    killer = kill_when(find_worker)
    report = ingest.run(load_config(str(shop / "toy.toml")))
    killer.join(timeout=1)
    assert not killer.is_alive(), "no worker was found"
    assert counts(report.figures) == COUNTS
    check_whole(shop)


NODE_DIES = """
import os, signal, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from ray_jobs import ingest
from ray_jobs.job import load_config

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
    print(ingest.run(load_config(sys.argv[1])).json_line(), flush=True)

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


@pytest.mark.parametrize("task", ["ray::_load_pieces", "ray::merge_pieces"])
def test_a_node_that_is_lost_costs_no_event(shop, task):
    done = subprocess.run(
        [sys.executable, "-c", NODE_DIES, str(shop / "toy.toml"), task],
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
    assert counts(json.loads(report)) == COUNTS
    check_whole(shop)


@pytest.mark.parametrize("table", ["quarantine", "events"])
def test_a_driver_that_is_killed_leaves_a_lake_that_the_next_run_completes(shop, table):
    command = [sys.executable, "-m", "ray_jobs.ingest", "--config", str(shop / "toy.toml")]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    driver = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    def is_writing() -> int | None:
        # Its tasks have begun to write what no commit knows yet.
        return driver.pid if any((shop / "lake" / table).rglob("*.parquet")) else None

    kill_when(is_writing).join(timeout=120)
    assert driver.wait(timeout=60) == -signal.SIGKILL
    for name in ("events", "quarantine"):
        assert open_table(str(shop / "lake"), name).version() == 0

    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert counts(json.loads(done.stdout.splitlines()[-1])) == COUNTS
    check_whole(shop)
