import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from recsys.registry import Serving
from serve_app.event_log import Backlog
from serve_app.metrics import MULTIPROCESS_DIR, Metrics

COUNTING = """
import sys
from serve_app.metrics import Metrics
metrics = Metrics()
metrics.shed.inc(int(sys.argv[1]))
metrics.in_flight.set(5)
metrics.request_seconds.labels("/v1/recommend", "model", "200").observe(0.004)
"""


class RecordingMetric:
    def __init__(self, calls, name, labels):
        self._calls, self._name, self._labels = calls, name, labels

    def _record(self, value, tags):
        assert set(tags) == set(self._labels)
        self._calls.append((self._name, value, tags))

    def inc(self, value, tags):
        assert value > 0
        self._record(value, tags)

    def observe(self, value, tags):
        self._record(value, tags)

    def set(self, value, tags):
        self._record(value, tags)


def test_agent_of_ray_is_told_the_same(monkeypatch):
    calls = []
    shared = SimpleNamespace(
        Counter=lambda name, text, labels: RecordingMetric(calls, name, labels),
        Gauge=lambda name, text, labels: RecordingMetric(calls, name, labels),
        Histogram=lambda name, text, bounds, labels: RecordingMetric(calls, name, labels),
    )
    metrics = Metrics("ranker", shared)
    metrics.shed.inc()
    metrics.input_items.labels("true").inc(0)
    metrics.input_items.labels("true").inc(3)
    metrics.history_seconds.labels("recent", "late").observe(0.5)
    metrics.breaker_open.set(True)

    assert calls == [
        ("nextitem_shed_requests", 1, {}),
        ("nextitem_input_items", 3, {"known": "true"}),
        ("nextitem_history_seconds", 0.5, {"operation": "recent", "outcome": "late"}),
        ("nextitem_breaker_open", True, {}),
    ]
    assert b"nextitem_shed_requests_total 1.0" in metrics.render()


def test_version_that_serves_no_more_has_no_share():
    metrics = Metrics("ranker")
    metrics.serve(Serving("a", {"b": 0.25}))
    metrics.serve(Serving("b"))

    text = metrics.render().decode()
    assert 'nextitem_model_share{component="ranker",version="a"} 0.0' in text
    assert 'nextitem_model_share{component="ranker",version="b"} 1.0' in text


def test_processes_of_a_node_are_added_up_and_the_dead_hold_no_requests(tmp_path):
    environment = os.environ | {MULTIPROCESS_DIR: str(tmp_path / "metrics")}
    for number in ("3", "4"):
        subprocess.run(
            [sys.executable, "-c", COUNTING, number],
            env=environment,
            check=True,
            cwd=Path(__file__).parents[2],
        )
    reading = "from serve_app.metrics import Metrics; print(Metrics().render().decode())"
    done = subprocess.run(
        [sys.executable, "-c", reading],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )

    assert "nextitem_shed_requests_total 7.0" in done.stdout
    line = 'nextitem_request_seconds_count{route="/v1/recommend",source="model",status="200"} 2.0'
    assert line in done.stdout
    assert "nextitem_requests_in_flight 0.0" in done.stdout


def test_what_waits_on_the_way_to_the_lake_is_shown():
    metrics = Metrics()
    metrics.show_backlog(Backlog(3, 12.5))
    text = metrics.render()
    assert b"nextitem_unshipped_events 3.0" in text
    assert b"nextitem_unshipped_age_seconds 12.5" in text
