"""Metrics for Prometheus. No label ever holds a user or an item.

Inside Ray Serve each process tells its node's agent of Ray too, where the names begin with `ray_`:
that is what a cluster's Prometheus reads, since a request for `/metrics` reaches one replica of
many. With `PROMETHEUS_MULTIPROC_DIR` set, as `serve_app.deployment` does, `/metrics` is the sum of
all processes of its node; else it is this process.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.values import ValueClass

from recsys.registry import Serving
from serve_app.event_log import Backlog

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"
_LATENCY_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07),
    *(0.1, 0.2, 0.5, 1.0, 5.0),
)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Child(Protocol):
    """A metric with its labels filled in; each kind has one of these."""

    def inc(self, amount: float = 1) -> None: ...

    def observe(self, value: float) -> None: ...

    def set(self, value: float) -> None: ...


class Instrument:
    """A metric in every place where it is read."""

    def __init__(self, local: Any, shared: Any, labels: Sequence[str]) -> None:
        self._local, self._shared = local, shared
        self._labels = labels
        self._children: dict[tuple[str, ...], Child] = {}

    def labels(self, *values: str) -> Child:
        """The metric with these values of its labels."""
        child = self._children.get(values)
        if child is None:
            local = self._local.labels(*values) if values else self._local
            tags = dict(zip(self._labels, values, strict=True))
            child = local if self._shared is None else _Both(local, self._shared, tags)
            self._children[values] = child
        return child

    def inc(self, amount: float = 1) -> None:
        self.labels().inc(amount)

    def observe(self, value: float) -> None:
        self.labels().observe(value)

    def set(self, value: float) -> None:
        self.labels().set(value)


class Metrics:
    """Everything that the service counts, in one process.

    Args:
        component: `ingress` or `ranker`; both report which versions they serve.
        shared: `ray.serve.metrics` inside a replica of Serve, whose agent is told too; else None.
    """

    def __init__(self, component: str = "ingress", shared: Any = None) -> None:
        self._component = component
        self._shared = shared
        self._registry = CollectorRegistry()
        _make_room()
        self._versions: set[str] = set()
        self._declare_requests()
        self._declare_parts()
        self._declare_models()

    def render(self) -> bytes:
        """The text format of Prometheus."""
        if not _adds_up():
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _declare_requests(self) -> None:
        self.request_seconds = self._histogram(
            "nextitem_request_seconds",
            "Time to answer a request; source: the rung that a list came from.",
            ("route", "source", "status"),
        )
        self.in_flight = self._gauge(
            "nextitem_requests_in_flight", "Requests that are being worked on.", (), "livesum"
        )
        self.shed = self._counter("nextitem_shed_requests", "Requests refused with 429.", ())
        self.recommendations = self._counter(
            "nextitem_recommendations", "Lists given.", ("version", "source", "degraded")
        )
        self.input_items = self._counter(
            "nextitem_input_items", "Items of histories that were asked with.", ("known",)
        )
        self.events = self._counter("nextitem_events", "Events received.", ("status",))

    def _declare_parts(self) -> None:
        self.cache_lookups = self._counter(
            "nextitem_cache_lookups",
            "Lookups of a ranked list: hit, shared (another replica had it), miss.",
            ("result",),
        )
        self.history_seconds = self._histogram(
            "nextitem_history_seconds",
            "Time of a call to the history store.",
            ("operation", "outcome"),
        )
        self.ranker_seconds = self._histogram(
            "nextitem_ranker_seconds",
            "Time until the ranker answered the ingress, or was given up.",
            ("outcome",),
        )
        self.breaker_open = self._gauge(
            "nextitem_breaker_open", "1 while the ranker is left alone.", (), "livemax"
        )
        self.batch_size = self._histogram(
            "nextitem_batch_size", "Requests that a ranker answers at once.", (), _SIZES
        )
        self.batch_seconds = self._histogram(
            "nextitem_batch_seconds", "Time that a ranker takes for a batch.", ()
        )
        self.waiting = self._gauge(
            "nextitem_ranker_waiting", "Requests inside a ranker.", (), "livesum"
        )
        self.exposures = self._counter(
            "nextitem_exposures", "Lists that were logged, or lost.", ("outcome",)
        )
        self.unshipped_events = self._gauge(
            "nextitem_unshipped_events",
            "Events of this node that are not in the landing folder yet.",
            (),
            "livemax",
        )
        self.unshipped_age = self._gauge(
            "nextitem_unshipped_age_seconds",
            "Time since the oldest of them was received.",
            (),
            "livemax",
        )

    def _declare_models(self) -> None:
        self.model_share = self._gauge(
            "nextitem_model_share",
            "Share of the visitors that see a version.",
            ("component", "version"),
            "mostrecent",
        )
        self.model_published = self._gauge(
            "nextitem_model_published_timestamp_seconds",
            "When a version was published; time() less this is its age.",
            ("version",),
            "mostrecent",
        )
        self.model_failures = self._counter(
            "nextitem_model_load_failures",
            "Versions that could not be loaded, and registries that could not be read.",
            ("component",),
        )

    def serve(self, serving: Serving) -> None:
        """What serves in this process from now on."""
        for version in self._versions - set(serving.versions):
            self.model_share.labels(self._component, version).set(0)
        self._versions = set(serving.versions)
        for version in serving.versions:
            self.model_share.labels(self._component, version).set(serving.share_of(version))

    def show_backlog(self, backlog: Backlog) -> None:
        """What waits on the way to the lake; the processes of a node share one log."""
        self.unshipped_events.set(backlog.events)
        self.unshipped_age.set(backlog.age_s)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...] = _LATENCY_S
    ) -> Instrument:
        local = prometheus_client.Histogram(
            name, text, labels, buckets=buckets, registry=self._registry
        )
        shared = self._shared and self._shared.Histogram(name, text, list(buckets), labels)
        return Instrument(local, shared, labels)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Instrument:
        local = prometheus_client.Counter(name, text, labels, registry=self._registry)
        shared = self._shared and self._shared.Counter(name, text, labels)
        return Instrument(local, shared, labels)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...], mode: Any) -> Instrument:
        local = prometheus_client.Gauge(
            name, text, labels, registry=self._registry, multiprocess_mode=mode
        )
        shared = self._shared and self._shared.Gauge(name, text, labels)
        return Instrument(local, shared, labels)


class _Both:
    """A child here, and the same one at the agent of Ray."""

    def __init__(self, local: Any, shared: Any, tags: dict[str, str]) -> None:
        self._local, self._shared, self._tags = local, shared, tags

    def inc(self, amount: float = 1) -> None:
        self._local.inc(amount)
        if amount > 0:  # Ray refuses to count nothing.
            self._shared.inc(amount, tags=self._tags)

    def observe(self, value: float) -> None:
        self._local.observe(value)
        self._shared.observe(value, tags=self._tags)

    def set(self, value: float) -> None:
        self._local.set(value)
        self._shared.set(value, tags=self._tags)


def _adds_up() -> bool:
    # The client decided when it was imported; libraries may have set the variable since.
    return bool(ValueClass._multiprocess)


def _make_room() -> None:
    """The folder that the processes of a node share; what ended processes measured as theirs alone
    is taken out of it.
    """
    if not _adds_up():
        return
    folder = Path(os.environ[MULTIPROCESS_DIR])
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("gauge_live*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            mark_process_dead(int(pid))  # type: ignore[no-untyped-call]
