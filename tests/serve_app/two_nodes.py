"""The endpoint on a Ray of two nodes of this machine, one ranker and one ingress on each; the word
`kill` on standard input takes the second node away. Ends with its standard input.

    python -m tests.serve_app.two_nodes <registry> <folder>
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import httpx

from ray_jobs.http_path import free_ports, plan_http_path
from ray_jobs.sections.serving import ServeConfig

_CPUS = 3
_SETTINGS = {"ingress_replicas": 2, "min_rankers": 2, "max_rankers": 2, "ranker_cpus": _CPUS - 1}
# A dead node is noticed within two seconds instead of fifteen.
_NOTICED_SOON = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_initial_delay_ms": "0",
}


def main():
    registry, folder = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as private:
        port, dashboard_port = free_ports("127.0.0.1", 2)
        path = plan_http_path(ServeConfig(port=port), Path(private))
        os.environ.update({**path.environment, **_NOTICED_SOON, "RAY_AUTH_MODE": "disabled"})
        serve_and_wait(registry, folder, port, dashboard_port)


def serve_and_wait(registry, folder, port, dashboard_port):
    # Ray reads the environment when it is imported.
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from serve_app.deployment import build

    node = {"num_cpus": _CPUS, "object_store_memory": 100 * 2**20}
    dashboard = {"include_dashboard": True, "dashboard_port": dashboard_port}
    cluster = Cluster(initialize_head=True, head_node_args={**node, **dashboard})
    second = cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    files = {
        "history_path": str(folder / "history.sqlite"),
        "metrics_dir": str(folder / "metrics"),
    }
    serve.run(build({"registry": str(registry), **files, **_SETTINGS}))
    url = f"http://127.0.0.1:{port}"
    while httpx.get(f"{url}/health/ready").status_code != httpx.codes.OK:
        time.sleep(0.1)
    answer(url=url, nodes=replicas_by_node())
    for _ in sys.stdin:
        cluster.remove_node(second, allow_graceful=False)
        answer(killed=True)
    ray.shutdown()
    cluster.shutdown()


def replicas_by_node():
    """Deployments by node: what a test wants to see spread."""
    from ray.util.state import list_actors

    nodes = {}
    for actor in list_actors(filters=[("state", "=", "ALIVE")]):
        for deployment in ("Ranker", "Ingress"):
            if f"#{deployment}#" in (actor.name or ""):
                nodes.setdefault(actor.node_id, []).append(deployment)
    return sorted(sorted(found) for found in nodes.values())


def answer(**found):
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
