"""Metrics of one process, for Prometheus. No label ever holds a user or an item."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """Everything that the ingress counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.request_seconds = Histogram(
            "nextitem_request_seconds",
            "Time to answer a request.",
            ("route", "status"),
            buckets=_LATENCY_S,
            registry=self._registry,
        )
        self.recommendations = self._counter(
            "nextitem_recommendations", "Lists given.", ("source", "degraded")
        )
        self.cache_lookups = self._counter(
            "nextitem_cache_lookups", "Lookups of a ranked list.", ("result",)
        )
        self.ranker_seconds = Histogram(
            "nextitem_ranker_seconds",
            "Time until the ranker answered or was given up.",
            ("outcome",),
            buckets=_LATENCY_S,
            registry=self._registry,
        )
        self.events = self._counter("nextitem_events", "Events received.", ("status",))
        self.input_items = self._counter(
            "nextitem_input_items", "Items of histories that were asked with.", ("known",)
        )
        self.shed = self._counter("nextitem_shed_requests", "Requests refused with 429.", ())
        self.breaker_open = Gauge(
            "nextitem_breaker_open",
            "1 while the ranker is left alone.",
            registry=self._registry,
        )
        self.model = Gauge(
            "nextitem_model_info", "The version that serves.", ("version",), registry=self._registry
        )

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)
