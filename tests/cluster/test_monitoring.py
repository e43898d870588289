"""Alerts and dashboards ask for metrics that exist, and the real promtool and Prometheus agree."""

import inspect
import json
import re
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml
from fastapi import FastAPI, Response
from ray.dashboard.modules.reporter import reporter_agent

from ray_jobs.job_metrics import FINISHED, JobMetrics
from ray_jobs.run_log import _GAUGES
from recsys.artifact import publish
from recsys.registry import promote, roll_back
from serve_app.api import create_app
from serve_app.deployment import _load_model
from serve_app.exposures import open_exposures
from serve_app.intake import open_intake
from serve_app.metrics import Metrics
from serve_app.ranker_host import RankerHost
from serve_app.recommender import Recommender
from serve_app.settings import Settings
from serve_app.versions import Versions
from tests.cluster.monitoring import (
    DASHBOARDS,
    MONITORING,
    alerts,
    expressions,
    named_metrics,
    panels,
    running_prometheus,
    wait_until,
)
from tests.conftest import write_artifact
from tests.ray_jobs.conftest import tiny_config
from tests.serve_app.http_server import running

ROOT = MONITORING.parents[1]
KINDS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def served_metrics():
    """Names that the endpoint shows."""
    return {
        family.name + suffix
        for family in Metrics()._registry.collect()
        for suffix in KINDS[family.type]
    }


def job_metrics():
    """Names that jobs set, as their sources have them, and the gauges of a training."""
    files = [path.read_text() for path in (ROOT / "ray_jobs").rglob("*.py")]
    plain = {name for text in files for name in re.findall(r'"(nextitem_\w+)"', text)}
    put_together = {
        name for text in files for name in named_metrics() if is_put_together(name, text)
    }
    return plain | put_together | {f"nextitem_train_{name}" for name in _GAUGES}


def is_put_together(name, source):
    """Whether a source has an f-string that a word of the same source would make this name."""
    for template in re.findall(r'f"(nextitem_[\w{}]+)"', source):
        match = re.fullmatch(re.sub(r"\{\w+\}", r"(\\w+)", template), name)
        if match and all(f'"{word}"' in source for word in match.groups()):
            return True
    return False


def node_metrics():
    """Names that Ray's agent gives of its machine."""
    found = re.findall(r'Gauge\(\s*"(\w+)"', inspect.getsource(reporter_agent))
    return {f"ray_{name}" for name in found}


def test_every_metric_that_is_asked_for_is_set_somewhere():
    assert named_metrics() - served_metrics() - job_metrics() - node_metrics() == {"up"}


def test_every_metric_of_the_endpoint_is_on_the_dashboard_of_serving():
    shown = (MONITORING / "grafana/dashboards/serving.json").read_text()
    stems = {re.sub("_(total|bucket|sum|count)$", "", name) for name in served_metrics()}
    assert not [stem for stem in stems if stem not in shown]


def test_alerts_say_how_urgent_they_are_and_what_happened():
    for rule in alerts().values():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"].endswith(".")


def test_every_alert_has_a_test_in_which_it_speaks_and_one_in_which_it_is_silent():
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(alerts())
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == set(alerts())


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_one_that_grafana_provisions(path):
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == f"nextitem-{path.stem}"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    sources = MONITORING / "grafana/provisioning/datasources/prometheus.yaml"
    (source,) = yaml.safe_load(sources.read_text())["datasources"]
    places = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}
        assert panel["targets"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + column, place["y"]) for column in range(place["w"])}
        assert not cells & places
        places |= cells


def test_scraping_gives_metrics_their_own_names_and_keeps_the_labels_of_jobs():
    for name in ("prometheus.yaml", "prometheus-kubernetes.yaml"):
        config = yaml.safe_load((MONITORING / name).read_text())
        nodes, jobs = config["scrape_configs"]
        assert (nodes["job_name"], jobs["job_name"]) == ("ray", "jobs")
        assert nodes["metric_relabel_configs"][0]["regex"] == "ray_(nextitem_.+)"
        assert jobs["honor_labels"] is True
        assert config["rule_files"] == ["alerts.yaml"]


def promtool(*arguments):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    return subprocess.run(
        ["promtool", *arguments],
        cwd=MONITORING,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_promtool_takes_the_configuration(tmp_path):
    done = promtool("check", "config", "prometheus.yaml")
    assert done.returncode == 0, done.stderr
    # Debian builds Prometheus without the discovery of Kubernetes; all the rest is held against it.
    config = yaml.safe_load((MONITORING / "prometheus-kubernetes.yaml").read_text())
    (discovery,) = config["scrape_configs"][0].pop("kubernetes_sd_configs")
    assert discovery == {"role": "pod", "namespaces": {"names": ["nextitem"]}}
    config["rule_files"] = []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = promtool("check", "config", str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr


def test_promtool_finds_that_alerts_speak_when_they_should():
    done = promtool("test", "rules", "alerts_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_every_expression_of_the_dashboards(tmp_path):
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    rules = [{"record": f"asked:{number}", "expr": expr} for number, expr in enumerate(asked)]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    done = promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


class Front:
    """The endpoint as one process of Serve has it, with a ranker inside, without Ray."""

    def __init__(self, registry: Path, folder: Path) -> None:
        self.settings = Settings(
            registry=registry,
            history_path=folder / "events.sqlite",
            events_landing=str(folder / "landing"),
            exposures=str(folder / "exposures"),
            registry_poll_s=0.1,
            ship_every_s=0.2,
            deadline_ms=20_000,
        )
        metrics = Metrics()
        self.versions = Versions(
            registry,
            partial(_load_model, metrics=metrics),
            on_change=metrics.serve,
            on_failure=lambda version: metrics.model_failures.labels("ingress").inc(),
        )
        self.versions.watch(self.settings.registry_poll_s)
        self.ranker = RankerHost(self.settings, metrics)
        self.intake = open_intake(self.settings, metrics.show_backlog)
        recommender = Recommender(
            self.versions,
            self.intake.history,
            self.ranker,
            self.settings,
            metrics,
            exposures=open_exposures(self.settings, metrics),
        )
        self.app = create_app(recommender, self.intake, self.settings)

    def close(self) -> None:
        self.ranker.close()
        self.versions.close()


def visit(url):
    """One of each thing that visitors do, some of it wrong."""
    for number in range(3):
        body = {"user_history": [f"i{number}", "unheard of"], "top_k": 5}
        assert httpx.post(f"{url}/v1/recommend", json=body, timeout=30).status_code == 200
    event = {"event_id": "e1", "user_id": "u1", "item_id": "i3", "timestamp": time.time()}
    assert httpx.post(f"{url}/v1/events", json={"events": [event]}).status_code == 202
    assert httpx.post(f"{url}/v1/recommend", json={"user_id": "u1"}).status_code == 200
    assert httpx.post(f"{url}/v1/recommend", json={"top_k": 0}).status_code == 422


def write_job_metrics(home):
    """The file that a job leaves, with every figure of jobs that rules and dashboards name."""
    names = named_metrics() - served_metrics() - node_metrics() - {"up", FINISHED}
    config = tiny_config(home)
    metrics = JobMetrics("monitor", config)
    for name in names:
        metrics.set(name, 1.0, "A figure.")
    metrics.publish()
    (file,) = (Path(config.storage.root) / "metrics").glob("*.prom")
    return names | {FINISHED}, file


@pytest.mark.slow
def test_a_real_prometheus_finds_every_metric_and_speaks_of_a_damaged_version(shop, tmp_path):
    own_registry = tmp_path / "registry"
    published_at = {"published_at": "2026-11-01T00:00:00+00:00"}
    publish(own_registry, "v1", partial(write_artifact, shop=shop), published_at)
    promote(own_registry, "v1")
    names_of_jobs, file = write_job_metrics(tmp_path / "home")
    front = Front(own_registry, tmp_path)
    others = FastAPI()

    @others.get("/jobs")
    def show_jobs():
        return Response(file.read_text(), media_type="text/plain; version=0.0.4")

    @others.get("/ray")
    def show_agent():
        # As an agent of Ray names what it hears from replicas.
        return Response("ray_nextitem_batch_size_sum 7\n", media_type="text/plain; version=0.0.4")

    with running(front.app) as port, running(others) as other_port:
        url = f"http://127.0.0.1:{port}"
        visit(url)
        shutil.copytree(own_registry / "v1", own_registry / "v2")
        (own_registry / "v2/model.safetensors").write_bytes(b"damaged")
        config = prometheus_config(port, other_port)
        with running_prometheus(tmp_path / "prometheus", config) as prometheus:
            log = tmp_path / "prometheus/log"
            wait_until(lambda: prometheus.query('nextitem_batch_size_sum{job="ray"} == 7'), log)
            wait_until(lambda: prometheus.query('nextitem_requests_in_flight{job="app"}'), log)
            promote(own_registry, "v2")
            wanted = served_metrics() | names_of_jobs
            prometheus.wait_for(wanted)
            wait_until(lambda: prometheus.query('ALERTS{alertname="VersionNotLoaded"} == 1'), log)
            for expression in expressions():
                prometheus.query(expression)
            finished = prometheus.query(f'{FINISHED}{{step="monitor",data="synthetic"}}')
            found = prometheus.names()
            roll_back(own_registry)
    front.close()

    assert len(finished) == 1
    assert not [name for name in found if name.startswith("ray_nextitem_")]


def prometheus_config(port, other_port):
    """That of the repository, in a hurry, with targets of this test."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    nodes, jobs = config["scrape_configs"]
    del nodes["file_sd_configs"]
    nodes |= {"static_configs": [{"targets": [f"127.0.0.1:{other_port}"]}], "metrics_path": "/ray"}
    jobs |= {"static_configs": nodes["static_configs"], "metrics_path": "/jobs"}
    app = {"job_name": "app", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
    return {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(MONITORING / "alerts.yaml")],
        "scrape_configs": [app, nodes, jobs],
    }
