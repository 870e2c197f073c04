"""What an engine counts, and how Prometheus reads it.

The engine's thread counts under the engine's lock, and a scrape copies the figures under the same lock, so that they
fit each other. Names and meanings of all of them are in ``_COUNTERS``, ``_GAUGES`` and ``_HISTOGRAMS``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Histogram:
    """Counts of values by the buckets they fall into, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Enter a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def copy(self) -> Histogram:
        """A histogram that stays as it is."""
        copied = Histogram(self.bounds)
        copied.counts, copied.sum = list(self.counts), self.sum
        return copied

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """How many values there are up to each bound, as Prometheus has them."""
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


def _seconds() -> Histogram:
    return Histogram(_SECONDS)


@dataclass(slots=True)
class EngineMetrics:
    """The figures of one engine since its start."""

    queue_seconds: Histogram = field(default_factory=_seconds)
    first_token_seconds: Histogram = field(default_factory=_seconds)
    inter_token_seconds: Histogram = field(default_factory=_seconds)
    step_seconds: Histogram = field(default_factory=_seconds)
    step_sequences: Histogram = field(default_factory=lambda: Histogram(_COUNTS))
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    restarts: int = 0
    running: int = 0
    waiting: int = 0
    cache_blocks: int = 0
    used_blocks: int = 0
    reusable_blocks: int = 0

    def copy(self) -> EngineMetrics:
        """The figures as they are now."""
        return replace(self, **{name: getattr(self, name).copy() for name in _HISTOGRAMS})


_COUNTERS = {
    "prompt_tokens": "Tokens of the prompts that were begun, reused ones included.",
    "reused_tokens": "Tokens of these prompts that were in the cache already.",
    "generated_tokens": "Tokens generated.",
    "drafted_tokens": "Tokens guessed by look-up or by the draft network.",
    "accepted_tokens": "Guessed tokens that were what the network picked.",
    "preemptions": "Sequences that gave their cache blocks up to an older one and were read again.",
    "failed_steps": "Steps that failed, with the requests in them.",
    "restarts": "Times that the processes of the model were lost and came up again.",
}
_GAUGES = {
    "running": "Sequences that hold cache blocks.",
    "waiting": "Requests in line.",
    "cache_blocks": "Blocks of the cache.",
    "used_blocks": "Blocks that sequences hold.",
    "reusable_blocks": "Blocks that nobody holds and that prompts may still begin with.",
}
_HISTOGRAMS = {
    "queue_seconds": "Time from the request to the step that begins its prompt.",
    "first_token_seconds": "Time from the request to its first token.",
    "inter_token_seconds": "Time from token to token; where a step gives several, its time by their number.",
    "step_seconds": "Time of a step.",
    "step_sequences": "Sequences in a step.",
}


def families(engines: Mapping[str, EngineMetrics]) -> Iterator[Metric]:
    """The figures of several engines, by the model's name, as Prometheus reads them."""
    prefix, labels = "llama_stack_engine_", ("model",)
    for name, documentation in _COUNTERS.items():
        counter = CounterMetricFamily(prefix + name, documentation, labels=labels)
        for model, metrics in engines.items():
            counter.add_metric((model,), getattr(metrics, name))
        yield counter
    for name, documentation in _GAUGES.items():
        gauge = GaugeMetricFamily(prefix + name, documentation, labels=labels)
        for model, metrics in engines.items():
            gauge.add_metric((model,), getattr(metrics, name))
        yield gauge
    for name, documentation in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(prefix + name, documentation, labels=labels)
        for model, metrics in engines.items():
            values: Histogram = getattr(metrics, name)
            histogram.add_metric((model,), values.buckets, values.sum)
        yield histogram
