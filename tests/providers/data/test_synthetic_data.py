"""Synthetic data: sampled, scored, filtered, stored."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from llama_stack_data import DatasetsConfig, SyntheticDataConfig
from llama_stack_data.plugin import start_datasets, start_synthetic_data
from llama_stack_data.synthetic.filters import FilterSettings, kept

from llama_stack.apis import Datasets, SyntheticDataGeneration
from llama_stack.apis.common import Message
from llama_stack.apis.synthetic_data_generation import (
    FilteringFunction,
    RewardScoringSettings,
    StoreAs,
    SyntheticDataGenerationRequest,
)
from llama_stack.errors import (
    AlreadyExistsError,
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from llama_stack.storage import open_store
from llama_stack.testing.scripted_inference import ScriptedInference
from tests.providers.data.stage import generator, rewards
from tests.providers.data.synthetic_data_rules import SyntheticDataRules

pytestmark = pytest.mark.anyio

CONFIG = SyntheticDataConfig(generator="scripted", model="words")


@asynccontextmanager
async def opened(
    inference: ScriptedInference, config: SyntheticDataConfig = CONFIG
) -> AsyncIterator[SyntheticDataGeneration]:
    async with start_synthetic_data(config, inference, rewards(), None) as data:
        yield data


class TestSyntheticData(SyntheticDataRules):
    """Everything that any provider must keep to."""

    @asynccontextmanager
    async def open(self, folder: Path) -> AsyncIterator[tuple[SyntheticDataGeneration, Datasets]]:
        async with open_store("sqlite", folder) as store:
            owner = "datasets.datasets"
            async with (
                start_datasets(DatasetsConfig(), store.database(owner), store.blobs(owner)) as datasets,
                start_synthetic_data(CONFIG, generator(), rewards(), datasets) as data,
            ):
                yield data, datasets


def request(*prompts: str, **settings: Any) -> SyntheticDataGenerationRequest:
    return SyntheticDataGenerationRequest(
        prompts=[Message.user(prompt) for prompt in prompts], reward_scoring=RewardScoringSettings(**settings)
    )


SCORES = [0.0, 2.0, 1.0, 2.0, -3.0]


@pytest.mark.parametrize(
    ("function", "settings", "places"),
    [
        ("none", {}, [0, 1, 2, 3, 4]),
        ("none", {"threshold": 1.0}, [1, 2, 3]),
        ("top_k", {"k": 1}, [1]),
        ("top_k", {"k": 3}, [1, 2, 3]),
        ("top_k", {"k": 9}, [0, 1, 2, 3, 4]),
        ("top_p", {"p": 1.0}, [0, 1, 2, 3, 4]),
        # softmax: 0.054, 0.400, 0.147, 0.400, 0.003
        ("top_p", {"p": 0.39}, [1]),
        ("top_p", {"p": 0.41}, [1, 3]),
        ("top_p", {"p": 0.81}, [1, 2, 3]),
        ("top_p", {"p": 0.95}, [0, 1, 2, 3]),
        ("top_k_top_p", {"k": 2, "p": 0.95}, [1, 3]),
        ("top_k_top_p", {"k": 4, "p": 0.41}, [1, 3]),
        ("top_p", {"p": 0.9, "threshold": 1.5}, [1, 3]),
        ("top_k", {"k": 3, "threshold": 3.0}, []),
        ("top_p", {"threshold": 3.0}, []),
        ("random", {"threshold": 3.0}, []),
        ("sigmoid", {"threshold": 3.0}, []),
    ],
)
def test_a_filter_keeps_by_rank_and_mass(function: str, settings: dict[str, Any], places: list[int]) -> None:
    """Of equals the first; the threshold comes before everything."""
    limits = FilterSettings(**{"k": 1, "p": 0.5, "threshold": None, **settings})
    assert kept(FilteringFunction(function), SCORES, limits, "0/0") == places


def test_random_keeps_a_half_and_every_half_alike() -> None:
    """Half of an odd number is rounded up, so that one answer is not lost. 400 seeds: each place is kept about half of
    the time; being off by more than 5 standard deviations has odds of 2 in a million for each of the 5.
    """
    limits = FilterSettings(1, 0.5, None)
    assert kept(FilteringFunction.RANDOM, [1.0], limits, "0/0") == [0]
    draws = [kept(FilteringFunction.RANDOM, SCORES, limits, f"{n}/0") for n in range(400)]
    assert {len(places) for places in draws} == {3}
    for place in range(5):
        share = sum(place in places for places in draws) / 400
        assert abs(share - 0.6) < 5 * math.sqrt(0.24 / 400)


def test_sigmoid_keeps_by_probability() -> None:
    """1,000 seeds, 5 standard deviations: odds of 2 in a million for each of the 5. Scores of any size have one."""
    limits = FilterSettings(1, 0.5, None)
    draws = [kept(FilteringFunction.SIGMOID, SCORES, limits, f"{n}/0") for n in range(1000)]
    for place, score in enumerate(SCORES):
        wanted = 1 / (1 + math.exp(-score))
        share = sum(place in places for places in draws) / 1000
        assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 1000)
    assert kept(FilteringFunction.SIGMOID, [1e308, -1e308], limits, "0/0") == [0]
    assert kept(FilteringFunction.TOP_P, [1e308, -1e308], limits, "0/0") == [0]


async def test_what_a_request_leaves_out_the_distribution_says() -> None:
    """Down to the sampling; and each sample has a seed of its own."""
    model = generator()
    config = SyntheticDataConfig.read(
        {
            "generator": "scripted",
            "model": "words",
            "n_samples": 3,
            "temperature": 0.5,
            "top_p": 0.8,
            "max_tokens": 5,
            "seed": 9,
        }
    )
    async with opened(model, config) as data:
        response = await data.generate(SyntheticDataGenerationRequest(prompts=[Message.user("a"), Message.user("a")]))
    asked = [(r.sampling_params.temperature, r.sampling_params.top_p, r.max_tokens) for r in model.requests]
    assert asked == [(0.5, 0.8, 5)] * 6
    assert len({r.sampling_params.seed for r in model.requests}) == 6
    assert [len(one.k_scored_generations) for one in response.synthetic_data] == [3, 3]
    assert response.statistics is not None
    assert response.statistics["settings"] == {
        "generator": "scripted", "model": "words", "n_samples": 3, "k": 1, "p": 0.5, "temperature": 0.5, "seed": 9,
        "filtering_function": "none",
    }  # fmt: skip


async def test_at_temperature_0_the_model_is_greedy() -> None:
    """As everywhere."""
    model = generator()
    async with opened(model) as data:
        await data.generate(request("a", temperature=0.0))
    assert {r.sampling_params.strategy.value for r in model.requests} == {"greedy"}


async def test_statistics_tell_how_the_data_came_about() -> None:
    """What was sampled, what is left of it, and how the scores lie; nothing in it changes when it is made again."""
    model = ScriptedInference(by=lambda r: ["one "] if r.dialog.message.content == "a" else ["w "] * 40)
    config = CONFIG.model_copy(update={"max_tokens": 8})
    asked = SyntheticDataGenerationRequest(
        prompts=[Message.user("a"), Message.user("b")],
        filtering_function=FilteringFunction.TOP_K,
        reward_scoring=RewardScoringSettings(n_samples=2, threshold=1.0),
    )
    async with opened(model, config) as data:
        told = (await data.generate(asked)).statistics
        assert told == (await data.generate(asked)).statistics
    assert told is not None
    assert {key: told[key] for key in ("prompts", "samples", "distinct_samples", "cut_samples", "kept")} == {
        "prompts": 2, "samples": 4, "distinct_samples": 2, "cut_samples": 2, "kept": 1,
    }  # fmt: skip
    assert told["prompts_without_kept"] == 1
    assert told["score"] == {"lowest": 0.25, "mean": 1.125, "highest": 2.0, "standard_deviation": 0.875}
    assert told["kept_score"] == {"lowest": 2.0, "mean": 2.0, "highest": 2.0, "standard_deviation": 0.0}


async def test_more_samples_than_allowed_are_refused_before_the_first() -> None:
    """Prompts times samples."""
    model = generator()
    async with opened(model, CONFIG.model_copy(update={"max_samples": 10})) as data:
        with pytest.raises(
            InvalidRequestError, match="2 prompts with 6 samples each make 12, and a request may ask for 10"
        ):
            await data.generate(request("a", "b", n_samples=6))
        with pytest.raises(InvalidRequestError, match="serves no datasets"):
            await data.generate(request("a").model_copy(update={"store_as": StoreAs(dataset_uuid="x")}))
        with pytest.raises(ModelNotFoundError, match="served: llama3_405b_reward, words"):
            await data.generate(request("a", model="none"))
    assert model.requests == []


async def test_an_id_that_is_taken_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    """The data would be made for nothing."""
    model, asked = generator(), request("a").model_copy(update={"store_as": StoreAs(dataset_uuid="made")})
    async with open_store("sqlite", tmp_path) as store:
        owner = "datasets.datasets"
        async with (
            start_datasets(DatasetsConfig(), store.database(owner), store.blobs(owner)) as datasets,
            start_synthetic_data(CONFIG, model, rewards(), datasets) as data,
        ):
            await data.generate(asked)
            sampled = len(model.requests)
            for other in ({"prompts": [Message.user("b")]}, {"filtering_function": FilteringFunction.TOP_K}):
                with pytest.raises(AlreadyExistsError):
                    await data.generate(asked.model_copy(update=other))
    assert len(model.requests) == sampled == 4


async def test_a_prompt_that_cannot_be_answered_is_named() -> None:
    """One of many: which one?"""
    model = ScriptedInference(
        by=lambda r: [ContextLengthError(99, 10)] if r.dialog.message.content == "long" else ["a"]
    )
    async with opened(model) as data:
        with pytest.raises(ContextLengthError, match=r"prompt 2: the prompt has 99 tokens") as error:
            await data.generate(request("short", "long"))
    assert error.value.faults[0].pointer == "/prompts/1"
    async with opened(ScriptedInference(by=lambda _: [OverloadedError("full")])) as data:
        with pytest.raises(OverloadedError, match="full"):
            await data.generate(request("a"))


async def test_so_many_samples_run_at_a_time_and_stop_with_their_client() -> None:
    """The engine's queue is everybody's."""
    never = asyncio.Event()
    model = ScriptedInference(by=lambda _: [never, "a"])
    async with opened(model, CONFIG.model_copy(update={"concurrency": 5})) as data:
        making = asyncio.create_task(data.generate(request("a", "b", "c", n_samples=4)))
        while len(model.requests) < 5:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert len(model.requests) == 5
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
    assert model.stopped == 5
