"""What an engine counts, as Prometheus reads it."""

from __future__ import annotations

from typing import Any

import pytest
from llama_stack_meta_reference.inference.engine import Generation
from llama_stack_meta_reference.inference.metrics import Histogram, families
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llama_stack.apis.common import SamplingParams
from tests.providers.meta_reference.lookup import byte_tokenizer, lookup_llama, new_engine

pytestmark = pytest.mark.anyio


class Collected:
    """A collector of families that are made already."""

    def __init__(self, made: Any) -> None:
        self.made = list(made)

    def collect(self) -> Any:
        return self.made


def scraped(engine: Any) -> dict[str, float]:
    """Every sample by its name, with the bound of its bucket, as a server's answer would be read."""
    registry = CollectorRegistry()
    registry.register(Collected(families({"m": engine.metrics()})))
    samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert sample.labels.pop("model") == "m"
            key = sample.name.removeprefix("llama_stack_engine_")
            samples[key + "".join(f" {value}" for value in sample.labels.values())] = sample.value
    return samples


async def test_what_was_asked_answered_and_reused_is_counted_exactly() -> None:
    """Operators size the cache and the machine by these, so each is what it says, to the token."""
    a, b = ord("a"), ord("b")
    model = lookup_llama({ord("\n"): a, a: b, b: a}, byte_tokenizer().vocab_size)
    engine = new_engine(model, byte_tokenizer(), blocks=64, lookup_tokens=8)
    engine.start()
    prompt = [1] * 39 + [ord("\n")]
    for _ in range(2):
        (ticket,) = engine.submit([Generation(prompt, SamplingParams(), max_tokens=30)])
        assert len([token async for token in ticket]) == 30
    found = scraped(engine)
    await engine.stop()
    assert found["prompt_tokens_total"] == 80
    assert found["reused_tokens_total"] == 32
    assert found["generated_tokens_total"] == 60
    assert 0 < found["accepted_tokens_total"] <= found["drafted_tokens_total"] < 60
    assert found["preemptions_total"] == found["failed_steps_total"] == 0
    assert found["queue_seconds_count"] == found["first_token_seconds_count"] == 2
    assert found["inter_token_seconds_count"] == 58
    assert 0 < found["queue_seconds_sum"] < found["first_token_seconds_sum"] < 60
    assert found["step_sequences_bucket 1.0"] == found["step_seconds_count"] == engine.steps
    assert (found["running"], found["waiting"]) == (0, 0)
    assert (found["cache_blocks"], found["used_blocks"], found["reusable_blocks"]) == (64, 0, 4)


async def test_what_a_sequence_finds_of_its_own_after_it_gave_way_is_not_reuse() -> None:
    """Counted, it would pass for prompts that are alike, and more could be reused than was ever asked."""
    a, b = ord("a"), ord("b")
    model = lookup_llama({ord("\n"): a, a: b, b: a}, byte_tokenizer().vocab_size)
    engine = new_engine(model, byte_tokenizer(), context=96, blocks=8)
    prompts = ([1] * 29 + [ord("\n")], [2] * 29 + [ord("\n")])
    engine.start()
    tickets = engine.submit([Generation(prompt, SamplingParams(), max_tokens=60) for prompt in prompts])
    for ticket in tickets:
        assert len([token async for token in ticket]) == 60
    found = scraped(engine)
    await engine.stop()
    assert found["preemptions_total"] > 0
    assert (found["prompt_tokens_total"], found["reused_tokens_total"]) == (60, 0)


def test_a_value_on_a_bound_belongs_to_its_bucket() -> None:
    """Prometheus' buckets are "less or equal"."""
    histogram = Histogram((1, 2))
    for value, times in ((1, 1), (1.5, 2), (2, 1), (7, 1)):
        histogram.observe(value, times)
    assert histogram.buckets == [("1.0", 1), ("2.0", 4), ("+Inf", 5)]
    assert histogram.sum == 13


def test_figures_that_were_copied_stay() -> None:
    """A scrape reads them while the engine counts on."""
    histogram = Histogram((1,))
    copied = histogram.copy()
    histogram.observe(0.5)
    assert copied.buckets == [("1.0", 0), ("+Inf", 0)]
