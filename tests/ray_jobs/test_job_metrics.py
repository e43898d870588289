"""Figures that a job leaves behind for Prometheus."""

import http.server
import logging
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ray_jobs.job import load_config
from ray_jobs.job_metrics import FINISHED, JobMetrics


@pytest.fixture
def gateway():
    """A server that keeps what is pushed, as (path, body) pairs."""
    pushed = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            pushed.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", pushed
        server.shutdown()
        thread.join()


def _metrics(tmp_path, *overrides):
    return JobMetrics(
        "monitor", load_config("synthetic", [f'storage.root="{tmp_path}"', *overrides])
    )


def _samples(text):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_file_holds_the_last_run_alone(tmp_path):
    first = _metrics(tmp_path)
    first.set("nextitem_old_ratio", 1.0, "Gone in the next run.")
    first.publish()
    second = _metrics(tmp_path)
    second.set("nextitem_drift_psi", 0.25, "Drift.", field="device")
    second.set("nextitem_drift_psi", 0.5, "Drift.", field="segment")
    second.publish()
    samples = _samples((tmp_path / "metrics" / "monitor.prom").read_text())
    finished = samples.pop((FINISHED, (("data", "synthetic"), ("step", "monitor"))))
    assert finished > 1e9
    assert samples == {
        ("nextitem_drift_psi", (("data", "synthetic"), ("field", "device"))): 0.25,
        ("nextitem_drift_psi", (("data", "synthetic"), ("field", "segment"))): 0.5,
    }


def test_a_gateway_is_told(tmp_path, gateway):
    address, pushed = gateway
    metrics = _metrics(tmp_path, f'monitoring.pushgateway="{address}"')
    metrics.set("nextitem_drift_psi", 0.25, "Drift.", field="device")
    metrics.publish()
    [(path, body)] = pushed
    assert path == "/metrics/job/nextitem-monitor/data/synthetic"
    assert body == (tmp_path / "metrics" / "monitor.prom").read_text()


def test_a_gateway_that_is_away_fails_no_job(tmp_path, caplog):
    metrics = _metrics(tmp_path, 'monitoring.pushgateway="http://127.0.0.1:9"')
    with caplog.at_level(logging.WARNING):
        metrics.publish()
    assert "did not reach http://127.0.0.1:9" in caplog.text
    assert (tmp_path / "metrics" / "monitor.prom").exists()


def test_an_object_store_gets_no_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    JobMetrics("monitor", load_config("synthetic", ['storage.root="s3://shop/home"'])).publish()
    assert not list(tmp_path.iterdir())
