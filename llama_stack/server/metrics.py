"""What Prometheus reads of this server. Labels come from the contracts and from our own codes, never from a client."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .exchange import Exchange

if TYPE_CHECKING:
    from ..apis.contract import Api
    from ..stack import ProviderStatus, Stack

logger = logging.getLogger("llama_stack.server.metrics")

MEDIA_TYPE = CONTENT_TYPE_LATEST.encode()
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_MOST_CODES = 200
"""Several times those that there are; a server behind the ``remote`` provider may send ever new ones."""


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, stack: Stack, running_now: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Providers(stack))
        self._requests = Counter(
            "llama_stack_requests",
            "Requests answered. A stream that failed after its first byte has status 200 and the code of its error.",
            ("method", "route", "status", "code"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "llama_stack_request_seconds",
            "Time from the request's headers to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._sent = Counter("llama_stack_sent_bytes", "Bytes of answers' bodies.", registry=self._registry)
        self._received = Counter("llama_stack_received_bytes", "Bytes of requests' bodies.", registry=self._registry)
        running = Gauge("llama_stack_requests_running", "Requests being served.", registry=self._registry)
        running.set_function(running_now)
        self._codes: set[str] = set()
        self._children: dict[tuple[str, str, int, str], tuple[Counter, Histogram]] = {}

    def count(self, exchange: Exchange, seconds: float) -> None:
        """Count an exchange that is over."""
        method = exchange.known_method
        code = exchange.code if exchange.code in self._codes or len(self._codes) < _MOST_CODES else "other"
        key = (method, exchange.template, exchange.status, code)
        children = self._children.get(key)
        if children is None:
            self._codes.add(code)
            labels = (method, exchange.template, str(exchange.status), code)
            children = self._requests.labels(*labels), self._seconds.labels(exchange.template)
            self._children[key] = children
        children[0].inc()
        children[1].observe(seconds)
        if exchange.bytes_out:
            self._sent.inc(exchange.bytes_out)
        if exchange.bytes_in:
            self._received.inc(exchange.bytes_in)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _Providers(Collector):
    """Reads the providers' states when it is asked, for they change without telling."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "llama_stack_provider_up", "Whether a provider is ready.", labels=("api", "provider", "id")
        )
        for status in self._stack.status():
            family.add_metric((status.api, status.provider, status.id), float(status.state == "ready"))
        yield family
        yield from self._own()

    def _own(self) -> Iterable[Metric]:
        """What the providers say of themselves: one family a name, for two providers may be of one kind."""
        families: dict[str, Metric] = {}
        for status, provider in self._stack.providers:
            for metric in _metrics_of(status, provider):
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    labels = {"api": status.api, "id": status.id, **sample.labels}
                    family.samples.append(sample._replace(labels=labels))
        return families.values()


def _metrics_of(status: ProviderStatus, provider: Api) -> list[Metric]:
    try:
        return list(provider.prometheus_metrics())
    except Exception:  # a provider's fault must not hide everyone's metrics
        logger.exception("provider %r of %r failed to give its metrics", status.id, status.api)
        return []
