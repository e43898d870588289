"""Faults under load: whatever breaks, each request gets a full list, and nobody is left without an
answer. How late answers come is measured by `benchmarks.serving`, not here.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.load import Plan, RunningLoad
from benchmarks.serving_app import Endpoint
from recsys.registry import promote, roll_back
from tests.serve_app.redis_server import running_redis

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

_RATE = 20
_LATE_MS = 70 + 50
"""The deadline of the service and some time around it."""
# Of users and of histories, no two alike, so that no cache answers for the ranker.
_BODIES = [{"user_history": [f"i{a}", f"i{b}"], "top_k": 10} for a in range(40) for b in range(40)]


class Stage:
    """An endpoint with its processes, which a test may end."""

    def __init__(self, endpoint, registry, folder):
        self.url = endpoint.url.removesuffix("/v1/recommend")
        self.registry = registry
        self.folder = folder
        self._root = psutil.Process(endpoint._process.pid)

    def replicas(self, deployment):
        """Processes of the replicas of a deployment, oldest first."""
        found = [
            process
            for process in self._root.children(recursive=True)
            if _is_replica(process, deployment)
        ]
        return sorted(found, key=lambda process: process.create_time())

    def under_load(self, act, *, seconds=8.0, bodies=_BODIES, rate=_RATE, connections=128):
        """The account of every request that was due while `act` did its worst."""
        plan = Plan(
            f"{self.url}/v1/recommend",
            bodies,
            seconds=seconds,
            rate=rate,
            connections=connections,
            timeout_s=30.0,
        )
        with RunningLoad(plan) as load:
            time.sleep(1.0)
            act()
            return load.wait()

    def wait_for_model(self):
        """Returns when lists come from the model again, on every try."""
        end, in_a_row = time.monotonic() + 120, 0
        number = 0
        while in_a_row < 5:
            assert time.monotonic() < end, "the model did not come back"
            number += 1
            body = {"user_history": [f"i{number % 40}", f"i{number // 40 % 40}"]}
            answer = self.post("recommend", {**body, "timeout_ms": 2000})
            assert answer.status_code == 200, answer.text
            in_a_row = in_a_row + 1 if answer.json()["source"] == "model" else 0
            time.sleep(0.05)

    def post(self, route, body):
        return httpx.post(f"{self.url}/v1/{route}", json=body, timeout=60)


def _is_replica(process, deployment):
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::ServeReplica") and f":{deployment}" in title


def assert_no_page_was_empty(result, *, cut_off=0):
    """`cut_off`: answers at most that broke off on their way."""
    # For whoever runs this with -rP on a machine that has nothing else to do.
    late = sum(took_ms > _LATE_MS for took_ms in result.latencies_ms)
    print(f"{late} of {result.sent} later than {_LATE_MS} ms: {result.figures()}")
    assert result.sent >= 100
    assert (result.non_2xx - _cut_off(result, cut_off), result.short) == (0, 0), (
        result.figures(),
        result.failures,
    )


def _cut_off(result, at_most):
    return min(result.errors.get("ClientPayloadError", 0), at_most)


@pytest.fixture(scope="module")
def redis_server():
    with running_redis() as server:
        yield server


@pytest.fixture(scope="module")
def stage(registry, redis_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    own_registry = folder / "registry"
    shutil.copytree(registry, own_registry)
    settings = {
        "history_path": str(folder / "history.sqlite"),
        "metrics_dir": str(folder / "metrics"),
        "shared_cache": redis_server.url,
        "registry_poll_s": 0.2,
        "ingress_replicas": 2,
        "ranker_cpus": 0.5,
        "max_rankers": 2,
        "ranker_target_ongoing": 1.0,
        "ranker_upscale_delay_s": 1.0,
        "ranker_downscale_delay_s": 2.0,
    }
    with Endpoint("haproxy", own_registry, **settings) as endpoint:
        yield Stage(endpoint, own_registry, folder)


def test_ranker_that_is_killed(stage):
    def kill():
        for process in stage.replicas("Ranker"):
            process.kill()

    result = stage.under_load(kill)
    stage.wait_for_model()

    assert_no_page_was_empty(result)
    assert result.sources["covisited"] > 0


def test_ranker_that_is_frozen(stage):
    frozen = stage.replicas("Ranker")

    def freeze():
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        threading.Timer(3.0, thaw).start()

    def thaw():
        for process in frozen:
            process.send_signal(signal.SIGCONT)

    result = stage.under_load(freeze)
    stage.wait_for_model()

    assert_no_page_was_empty(result)
    assert result.sources["covisited"] > 0


def test_ingress_replica_that_is_killed(stage):
    def kill():
        stage.replicas("Ingress")[0].kill()

    result = stage.under_load(kill)
    stage.wait_for_model()

    assert_no_page_was_empty(result)


def test_shared_cache_that_is_killed(stage, redis_server):
    result = stage.under_load(redis_server.kill)
    redis_server.start()

    assert_no_page_was_empty(result)
    assert result.sources["model"] > 0


def test_histories_in_a_redis_that_is_killed(registry, tmp_path):
    events = [
        {
            "event_id": f"e{number}",
            "user_id": f"u{number % 100}",
            "item_id": f"i{number % 40}",
            "timestamp": time.time(),
        }
        for number in range(200)
    ]
    settings = {"history": "redis", "history_path": str(tmp_path / "events.sqlite")}
    with (
        running_redis() as redis_server,
        Endpoint(
            "haproxy", registry, **settings, redis_url=redis_server.url, cache_size=0
        ) as endpoint,
    ):
        stage = Stage(endpoint, registry, tmp_path)
        assert stage.post("events", {"events": events[:100]}).json()["accepted"] == 100
        accepted = []

        def kill():
            redis_server.kill()
            accepted.append(stage.post("events", {"events": events[100:]}))

        bodies = [{"user_id": f"u{number}", "top_k": 10} for number in range(100)]
        result = stage.under_load(kill, bodies=bodies)
        redis_server.start()
        wait_for_histories(stage)

    assert_no_page_was_empty(result)
    assert result.sources["model"] > 0
    assert result.sources["popular"] > 0
    assert accepted[0].status_code == 202


def wait_for_histories(stage):
    """Returns when the history of before and the event of the outage are both there."""
    end = time.monotonic() + 60
    while True:
        answer = httpx.get(f"{stage.url}/v1/users/u7/history", timeout=60)
        if answer.status_code == 200 and len(answer.json()["events"]) == 2:
            return
        assert time.monotonic() < end, answer.text
        time.sleep(0.2)


def test_version_that_is_damaged_at_its_swap(stage):
    def promote_damaged():
        shutil.copytree(stage.registry / "v2", stage.registry / "v3")
        os.truncate(stage.registry / "v3" / "model.safetensors", 100)
        promote(stage.registry, "v3")

    result = stage.under_load(promote_damaged)
    roll_back(stage.registry)
    answer = stage.post("recommend", {"user_history": ["i1"]}).json()

    assert_no_page_was_empty(result)
    assert answer["model_version"] == "v1"


def test_version_that_takes_over_and_is_rolled_back(stage):
    def swap():
        promote(stage.registry, "v2")
        threading.Timer(4.0, roll_back, (stage.registry,)).start()

    result = stage.under_load(swap, seconds=10.0)

    assert_no_page_was_empty(result)


def test_event_log_that_another_process_locks(stage):
    refused = []

    def lock():
        connection = sqlite3.connect(stage.folder / "history.sqlite", check_same_thread=False)
        connection.execute("BEGIN EXCLUSIVE")
        refused.append(stage.post("events", {"events": [event]}))
        connection.close()

    event = {"event_id": "locked", "user_id": "u1", "item_id": "i1", "timestamp": time.time()}
    bodies = [{"user_id": f"u{number}"} for number in range(100)]
    result = stage.under_load(lock, bodies=bodies)
    accepted = stage.post("events", {"events": [event]})

    assert_no_page_was_empty(result)
    assert (refused[0].status_code, refused[0].json()["code"]) == (503, "unavailable")
    assert refused[0].headers["Retry-After"]
    assert accepted.json()["accepted"] == 1


def test_rankers_that_come_and_go_with_the_load(stage):
    def under_load_until(number, **load):
        """All requests until there are so many rankers, and some that come after."""
        result = stage.under_load(lambda: None, seconds=6.0, **load)
        for _ in range(20):
            is_reached = len(stage.replicas("Ranker")) == number
            result += stage.under_load(lambda: None, seconds=6.0, **load)
            if is_reached:
                return result
        raise AssertionError(f"{number} rankers were awaited")

    # As much as it can answer: no machine is too fast for that.
    busy = under_load_until(2, rate=None, connections=16)
    calm = under_load_until(1, rate=20)

    for result in (busy, calm):
        assert_no_page_was_empty(result)


def test_node_that_is_lost(registry, tmp_path):
    # Ray tells a lot on standard error.
    with (tmp_path / "stderr").open("w") as errors:
        nodes = subprocess.Popen(
            [sys.executable, "-m", "tests.serve_app.two_nodes", str(registry), str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env={name: text for name, text in os.environ.items() if "RAY_SERVE" not in name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with nodes:
        found = read_answer(nodes)
        assert found["nodes"] == [["Ingress", "Ranker"]] * 2
        plan = Plan(
            f"{found['url']}/v1/recommend", _BODIES, seconds=15.0, rate=_RATE, connections=128
        )
        with RunningLoad(plan) as load:
            time.sleep(2.0)
            print("kill", file=nodes.stdin, flush=True)
            result = load.wait()
        assert read_answer(nodes) == {"killed": True}
        answer = httpx.post(plan.url, json=_BODIES[0] | {"timeout_ms": 5000}, timeout=30).json()
        nodes.stdin.close()
        nodes.wait(60)

    # What a node had begun to send when it was lost nobody can send again.
    assert_no_page_was_empty(result, cut_off=1)
    assert answer["source"] == "model"


def read_answer(process):
    line = next(line for line in process.stdout if line.startswith("{"))
    return json.loads(line)
