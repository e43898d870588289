"""What a cluster loses and gets back while it serves: its head, and a worker that is drained."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil
import pytest

from benchmarks.load import Plan, RunningLoad
from ray_jobs.http_path import free_ports
from tests.cluster.private_ray import PrivateRay, wait_until
from tests.serve_app.redis_server import running_redis

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

_BODIES = [{"user_history": [f"i{a}", f"i{b}"], "top_k": 10} for a in range(40) for b in range(40)]
_SETTINGS = {"ingress_replicas": 2, "min_rankers": 2, "max_rankers": 2, "ranker_cpus": 2}


@pytest.fixture(scope="module")
def cluster(registry):
    """A head and two workers, each with an ingress and a ranker."""
    (port,) = free_ports("127.0.0.1", 1)
    with (
        running_redis("--port", str(port), "--bind", "127.0.0.1"),
        TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as private,
    ):
        folder = Path(private)
        ray = PrivateRay(folder, f"127.0.0.1:{port}")
        try:
            ray.start_head()
            ray.start_worker("first")
            ray.start_worker("second")
            files = {
                "history_path": str(folder / "history.sqlite"),
                "metrics_dir": str(folder / "metrics"),
            }
            ray.deploy({"registry": str(registry), **files, **_SETTINGS})
            yield ray
        finally:
            ray.close()


def under_load(url, act, seconds):
    """The account of every request that was due while `act` did its worst."""
    plan = Plan(
        f"{url}/v1/recommend", _BODIES, seconds=seconds, rate=20, connections=128, timeout_s=30
    )
    with RunningLoad(plan) as load:
        time.sleep(1.0)
        act()
        return load.wait()


def assert_no_page_was_empty(result):
    # For whoever runs this with -rP: how late answers were, and when.
    print(result.figures(), *result.slowest, sep="\n")
    assert result.sent >= 100
    assert (result.non_2xx, result.short) == (0, 0), (result.figures(), result.failures)


def test_replicas_answer_while_the_head_is_away_and_a_new_head_takes_them_over(cluster):
    before = cluster.replicas("Ingress") | cluster.replicas("Ranker")

    def restart_head():
        cluster.kill("head")
        time.sleep(2.0)
        cluster.start_head()

    # HAProxy of this machine goes with the head; on a cluster every worker has one of its own.
    result = under_load(cluster.direct_url(), restart_head, 14.0)
    cluster.wait_until_ready()
    after = cluster.replicas("Ingress") | cluster.replicas("Ranker")
    (victim, *_) = cluster.replicas("Ranker")
    psutil.Process(victim).kill()
    wait_until(lambda: len(cluster.replicas("Ranker").keys() - {victim}) == 2)

    assert_no_page_was_empty(result)
    assert result.sources["model"] > 0
    assert after == before


def test_a_worker_that_is_drained_hands_its_replicas_over(cluster):
    cluster.start_worker("third")

    def drain():
        cluster.drain("first", 30)
        wait_until(lambda: "first" not in cluster.replicas("Ranker").values())
        cluster.kill("first")

    result = under_load(cluster.url, drain, 14.0)
    for deployment in ("Ranker", "Ingress"):
        wait_until(lambda name=deployment: homes(cluster, name) == ["second", "third"])
    answer = httpx.post(
        f"{cluster.url}/v1/recommend", json=_BODIES[0] | {"timeout_ms": 5000}, timeout=30
    )

    assert_no_page_was_empty(result)
    assert answer.json()["source"] == "model"


def homes(cluster, deployment):
    """Nodes of the replicas of a deployment."""
    return sorted(cluster.replicas(deployment).values())
