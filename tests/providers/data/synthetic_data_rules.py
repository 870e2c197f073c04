"""What synthetic data keeps to, beyond the conformance kit: each filter, the threshold, what is stored."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from llama_stack.apis import Datasets, SyntheticDataGeneration
from llama_stack.apis.common import Message
from llama_stack.apis.datasets import ColumnKind, Dataset, ReadDatasetRequest
from llama_stack.apis.reward_scoring import ScoredMessage
from llama_stack.apis.synthetic_data_generation import (
    FilteringFunction,
    RewardScoringSettings,
    RowLayout,
    StoreAs,
    SyntheticDataGenerationRequest,
    SyntheticDataGenerationResponse,
)
from llama_stack.errors import AlreadyExistsError, ModelNotFoundError, NotFoundError

PROMPTS = ["Say hello.", "Name a sea.", "Tell me of \U0001f600."]


def request(function: FilteringFunction = FilteringFunction.NONE, **settings: Any) -> SyntheticDataGenerationRequest:
    """A request for eight samples of each of three prompts."""
    store_as = settings.pop("store_as", None)
    return SyntheticDataGenerationRequest(
        prompts=[Message.user(prompt) for prompt in PROMPTS],
        filtering_function=function,
        reward_scoring=RewardScoringSettings(**{"n_samples": 8, "seed": 7, "temperature": 1.0, **settings}),
        store_as=store_as,
    )


def kept(response: SyntheticDataGenerationResponse) -> list[list[ScoredMessage]]:
    """The answers that were kept, prompt by prompt."""
    assert [one.prompt.content for one in response.synthetic_data] == PROMPTS
    return [one.k_scored_generations for one in response.synthetic_data]


def is_part(some: list[ScoredMessage], whole: list[ScoredMessage]) -> bool:
    """Whether these are some of the whole, in their order."""
    rest = iter(whole)
    return all(one in rest for one in some)


class SyntheticDataRules:
    """A subclass says how the provider is opened."""

    pytestmark = pytest.mark.anyio

    @abstractmethod
    def open(self, folder: Path) -> AbstractAsyncContextManager[tuple[SyntheticDataGeneration, Datasets]]:
        """A provider, and the datasets beside it; both are closed at the end of the block."""

    @pytest.fixture
    async def stage(self, tmp_path: Path) -> AsyncIterator[tuple[SyntheticDataGeneration, Datasets]]:
        """Both, opened."""
        async with self.open(tmp_path / "state") as stage:
            yield stage

    @pytest.fixture
    def data(self, stage: tuple[SyntheticDataGeneration, Datasets]) -> SyntheticDataGeneration:
        """The provider."""
        return stage[0]

    @pytest.fixture
    def datasets(self, stage: tuple[SyntheticDataGeneration, Datasets]) -> Datasets:
        """The datasets."""
        return stage[1]

    async def test_without_a_filter_every_sample_comes_back(self, data: SyntheticDataGeneration) -> None:
        """Prompt by prompt in the order of the request, each answer with its score."""
        answers = kept(await data.generate(request()))
        assert [len(of_prompt) for of_prompt in answers] == [8, 8, 8]
        assert all(math.isfinite(answer.score) for of_prompt in answers for answer in of_prompt)
        nothing = SyntheticDataGenerationRequest(prompts=[])
        assert (await data.generate(nothing)).synthetic_data == []

    @pytest.mark.parametrize("function", list(FilteringFunction))
    async def test_the_same_seed_gives_the_same_data(
        self, data: SyntheticDataGeneration, function: FilteringFunction
    ) -> None:
        """Whoever doubts a data set can make it again; and a filter keeps some of the samples, in their order."""
        whole = kept(await data.generate(request()))
        some = kept(await data.generate(request(function)))
        assert some == kept(await data.generate(request(function)))
        assert all(is_part(*pair) for pair in zip(some, whole, strict=True))

    async def test_each_filter_keeps_what_it_says(self, data: SyntheticDataGeneration) -> None:
        """The settled reading of operation 24."""
        whole = kept(await data.generate(request()))
        for of_prompt, half in zip(whole, kept(await data.generate(request(FilteringFunction.RANDOM))), strict=True):
            assert (len(of_prompt), len(half)) == (8, 4)
        best = kept(await data.generate(request(FilteringFunction.TOP_K, k=3)))
        mass = kept(await data.generate(request(FilteringFunction.TOP_P, p=0.5)))
        both = kept(await data.generate(request(FilteringFunction.TOP_K_TOP_P, k=3, p=0.5)))
        for n, of_prompt in enumerate(whole):
            scores = sorted((answer.score for answer in of_prompt), reverse=True)
            assert sorted((answer.score for answer in best[n]), reverse=True) == scores[:3]
            masses = [math.exp(score - scores[0]) for score in scores]
            count = len(mass[n])
            assert sorted((answer.score for answer in mass[n]), reverse=True) == scores[:count]
            assert sum(masses[:count]) >= 0.5 * sum(masses) - 1e-9
            assert sum(masses[: count - 1]) < 0.5 * sum(masses) + 1e-9
            assert len(both[n]) == min(3, count)

    async def test_what_is_below_the_threshold_is_never_kept(self, data: SyntheticDataGeneration) -> None:
        """Whatever the filter."""
        whole = kept(await data.generate(request()))
        scores = sorted(answer.score for of_prompt in whole for answer in of_prompt)
        threshold = scores[len(scores) // 2]
        for function in FilteringFunction:
            for of_prompt in kept(await data.generate(request(function, threshold=threshold))):
                assert all(answer.score >= threshold for answer in of_prompt)
        assert kept(await data.generate(request(threshold=scores[-1] + 1))) == [[], [], []]

    async def test_an_unknown_model_is_not_found(self, data: SyntheticDataGeneration) -> None:
        """404, for the generator and for the reward model."""
        for asked in (request(model="no-such-model"), request(generator="no-such-model")):
            with pytest.raises(ModelNotFoundError, match="no-such-model"):
                await data.generate(asked)

    async def test_the_result_becomes_a_dataset_in_the_same_call(
        self, data: SyntheticDataGeneration, datasets: Datasets
    ) -> None:
        """Dialogs with their scores, which fine-tuning reads as they are; the same request again is a success."""
        asked = request(FilteringFunction.TOP_K, k=2, store_as=StoreAs(dataset_uuid="made", metadata={"by": "a test"}))
        answers = kept(await data.generate(asked))
        dataset = await datasets.get_dataset("made")
        assert dataset.columns == {"dialog": ColumnKind.DIALOG, "score": ColumnKind.NUMBER}
        assert dataset.metadata["by"] == "a test"
        rows = await _rows(datasets, dataset)
        assert [row["score"] for row in rows] == [answer.score for of_prompt in answers for answer in of_prompt]
        dialogs = [[Message.model_validate_json(json.dumps(message)) for message in row["dialog"]] for row in rows]
        assert dialogs == [
            [Message.user(prompt), answer.message]
            for prompt, of_prompt in zip(PROMPTS, answers, strict=True)
            for answer in of_prompt
        ]
        assert kept(await data.generate(asked)) == answers
        assert await datasets.get_dataset("made") == dataset

    async def test_preferences_pair_the_best_kept_answer_with_the_worst(
        self, data: SyntheticDataGeneration, datasets: Datasets
    ) -> None:
        """Three dialog columns, which preference optimisation reads as they are; no pair of equals."""
        whole = kept(await data.generate(request()))
        store_as = StoreAs(dataset_uuid="pairs", layout=RowLayout.PREFERENCES)
        await data.generate(request(FilteringFunction.TOP_K, k=2, store_as=store_as))
        dataset = await datasets.get_dataset("pairs")
        assert dataset.columns == dict.fromkeys(("prompt", "chosen", "rejected"), ColumnKind.DIALOG)
        expected = [
            (prompt, max(answer.score for answer in of_prompt), min(answer.score for answer in of_prompt))
            for prompt, of_prompt in zip(PROMPTS, whole, strict=True)
        ]
        rows = await _rows(datasets, dataset)
        assert [row["prompt"][0]["content"] for row in rows] == [
            prompt for prompt, most, least in expected if most > least
        ]
        for row in rows:
            of_prompt = whole[PROMPTS.index(row["prompt"][0]["content"])]
            score = {
                answer.message.content: answer.score for answer in of_prompt if isinstance(answer.message.content, str)
            }
            assert score[row["chosen"][0]["content"]] == max(score.values())
            assert score[row["rejected"][0]["content"]] == min(score.values())

    async def test_an_id_that_is_taken_is_refused_and_stays(
        self, data: SyntheticDataGeneration, datasets: Datasets
    ) -> None:
        """409; other data of the same id is not overwritten. A request that fails stores nothing."""
        await data.generate(request(store_as=StoreAs(dataset_uuid="made")))
        before = await datasets.get_dataset("made")
        with pytest.raises(AlreadyExistsError):
            await data.generate(request(seed=8, store_as=StoreAs(dataset_uuid="made")))
        assert await datasets.get_dataset("made") == before
        with pytest.raises(ModelNotFoundError):
            await data.generate(request(generator="no-such-model", store_as=StoreAs(dataset_uuid="never")))
        with pytest.raises(NotFoundError):
            await datasets.get_dataset("never")


async def _rows(datasets: Datasets, dataset: Dataset) -> list[dict[str, Any]]:
    return [row async for row in await datasets.read(ReadDatasetRequest(dataset=dataset))]
