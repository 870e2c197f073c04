"""What rules and judge both keep to, beyond the conformance kit."""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

import pytest

from llama_stack.apis import RewardScoring
from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.models import ModelKind
from llama_stack.apis.reward_scoring import PromptGenerations, RewardScoringRequest, RewardScoringResponse
from llama_stack.errors import ModelNotFoundError

ANSWERS = ("Oslo.", "The capital of Norway is Oslo.", "", "Ærø, 東京, \U0001f600\u2028\u0000", "word " * 200)


def asked(question: str, answers: Sequence[str]) -> PromptGenerations:
    """A question and its answers, after a word of greeting."""
    history = [Message.user("Hello."), Message.assistant("Hello! What would you like to know?")]
    return PromptGenerations(
        dialog=Dialog(message=Message.user(question), message_history=history),
        k_generations=[Message.assistant(answer) for answer in answers],
    )


def scores_of(response: RewardScoringResponse) -> list[list[float]]:
    """The scores, dialog by dialog."""
    return [[answer.score for answer in one.k_scored_generations] for one in response.scored_generations]


class RewardRules:
    """A subclass says how the provider is opened, and by which of its models answers are scored."""

    pytestmark = pytest.mark.anyio

    model: str
    """A model that the provider serves."""
    tolerance = 0.0
    """How far the scores of an answer may lie apart, alone and in a batch."""

    @abstractmethod
    def open(self) -> AbstractAsyncContextManager[RewardScoring]:
        """A provider; it is closed at the end of the block."""

    @pytest.fixture
    async def rewards(self) -> AsyncIterator[RewardScoring]:
        """The provider."""
        async with self.open() as rewards:
            yield rewards

    async def score(self, rewards: RewardScoring, *dialogs: PromptGenerations) -> RewardScoringResponse:
        """Score answers by the model."""
        return await rewards.score(RewardScoringRequest(model=self.model, prompt_generations=list(dialogs)))

    async def test_every_answer_gets_a_score_in_the_order_of_the_request(self, rewards: RewardScoring) -> None:
        """All come back, the same ones among them; ``prompt`` is the message of the dialog (spec operation 23)."""
        dialogs = [asked("Which is the capital of Norway?", ANSWERS), asked("And?", ["Yes.", "Yes."])]
        response = await self.score(rewards, *dialogs)
        assert [one.prompt for one in response.scored_generations] == [one.dialog.message for one in dialogs]
        for one, dialog in zip(response.scored_generations, dialogs, strict=True):
            assert [answer.message for answer in one.k_scored_generations] == dialog.k_generations
            assert all(math.isfinite(answer.score) for answer in one.k_scored_generations)

    async def test_an_answer_is_scored_for_itself(self, rewards: RewardScoring) -> None:
        """Neither what stands beside it nor when it is asked changes a score."""
        question = "Which is the capital of Norway?"
        ((*together,),) = scores_of(await self.score(rewards, asked(question, ANSWERS)))
        ((*again,),) = scores_of(await self.score(rewards, asked(question, ANSWERS)))
        alone = [scores_of(await self.score(rewards, asked(question, [answer])))[0][0] for answer in ANSWERS]
        for other in (again, alone):
            assert other == pytest.approx(together, abs=self.tolerance, rel=self.tolerance)

    async def test_nothing_to_score_is_nothing(self, rewards: RewardScoring) -> None:
        """Lists may be empty."""
        assert scores_of(await self.score(rewards)) == []
        assert scores_of(await self.score(rewards, asked("Well?", []))) == [[]]

    async def test_many_at_once_come_back_right(self, rewards: RewardScoring) -> None:
        """Requests that run beside each other do not mix."""
        requests = [asked(f"Question {n}?", ANSWERS[n % 5 :]) for n in range(10)]
        responses = await asyncio.gather(*(self.score(rewards, request) for request in requests))
        for request, response in zip(requests, responses, strict=True):
            (one,) = response.scored_generations
            assert (one.prompt, len(one.k_scored_generations)) == (request.dialog.message, len(request.k_generations))

    async def test_an_unknown_model_is_not_found(self, rewards: RewardScoring) -> None:
        """404 that lists those that are served."""
        request = RewardScoringRequest(model="no-such-model", prompt_generations=[asked("Well?", ["Yes."])])
        with pytest.raises(ModelNotFoundError, match=self.model):
            await rewards.score(request)

    async def test_its_models_are_in_the_catalogue(self, rewards: RewardScoring) -> None:
        """As reward models; an alias names a model that is there."""
        served = {model.model: model for model in await rewards.models()}
        assert self.model in served
        assert await rewards.owns(self.model)
        assert not await rewards.owns("no-such-model")
        for model in served.values():
            assert model.kind is ModelKind.REWARD
            assert model.alias_of is None or model.alias_of in served
