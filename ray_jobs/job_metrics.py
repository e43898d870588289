"""What a job tells Prometheus, which would find no process of it to ask a minute later.

The figures are kept in `<root>/metrics/<job>.prom`, in the text format that the textfile collector
of node_exporter reads, and pushed to a Pushgateway where `[monitoring] pushgateway` names one. Both
hold the last run's figures until the next one replaces them. Every figure has the label `data`, the
name of the configuration.
"""

import logging
import time
import urllib.error
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, write_to_textfile

from ray_jobs.config import PipelineConfig
from ray_jobs.sections.storage import expand

log = logging.getLogger(__name__)

FINISHED = "nextitem_job_finished_timestamp_seconds"
_PUSH_TIMEOUT_S = 5.0


class JobMetrics:
    """The figures of one run of a job; `publish` replaces those of the run before.

    Args:
        job: its name, such as `monitor`.
    """

    def __init__(self, job: str, config: PipelineConfig) -> None:
        self._job, self._config = job, config
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}

    def set(self, name: str, value: float, meaning: str, **labels: str) -> None:
        """Sets a gauge.

        Args:
            name: begins with `nextitem_` and ends with its unit, e.g. `nextitem_drift_psi_ratio`.
            meaning: one sentence; the first one that is given for a name stays.
            labels: the same names each time; never a user or an item.
        """
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = Gauge(name, meaning, ("data", *sorted(labels)), registry=self._registry)
            self._gauges[name] = gauge
        gauge.labels(data=self._config.name, **labels).set(value)

    def publish(self) -> None:
        """Writes the file and pushes, with the time as `FINISHED{step=<job>}`.

        A Pushgateway that cannot be reached fails no job: it is warned of, and the alert on old
        figures tells the rest.
        """
        self.set(FINISHED, time.time(), "When a job last came to its end.", step=self._job)
        folder = _folder(self._config)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(folder / f"{self._job}.prom"), self._registry)
        gateway = self._config.monitoring.pushgateway
        if gateway is not None:
            self._push(gateway)

    def _push(self, gateway: str) -> None:
        try:
            push_to_gateway(
                gateway,
                job=f"nextitem-{self._job}",
                registry=self._registry,
                grouping_key={"data": self._config.name},
                timeout=_PUSH_TIMEOUT_S,
            )
        except (urllib.error.URLError, OSError) as error:
            log.warning("Figures of %s did not reach %s: %s.", self._job, gateway, error)


def _folder(config: PipelineConfig) -> Path | None:
    root = expand(config.storage.root)
    return None if "://" in root else Path(root) / "metrics"
