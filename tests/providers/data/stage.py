"""A generator whose answers hang on the seed, and a reward that counts words: data that any test can foresee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_stack_data.config import RulesConfig
from llama_stack_data.rewards.provider import Rewards
from llama_stack_data.rewards.rules import Rules

from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.inference import ChatCompletionRequest
from llama_stack.testing.scripted_inference import Answer, ScriptedInference


def by_seed(request: ChatCompletionRequest) -> Answer:
    """From 1 to 13 words, by the seed of the request; each a piece, so that ``max_tokens`` cuts there."""
    count = (request.sampling_params.seed or 0) % 13 + 1
    return [f"word{n} " for n in range(count)]


def generator() -> ScriptedInference:
    """The model ``scripted``."""
    return ScriptedInference(by=by_seed)


class Words:
    """Scores an answer by how many words it has."""

    metadata: Mapping[str, Any] = {}

    async def scores(self, dialog: Dialog, answers: Sequence[Message]) -> list[float]:
        return [float(len(str(answer.content).split())) / 4 for answer in answers]


def rewards() -> Rewards:
    """The reward model ``words``, also as the draft's own name."""
    return Rewards({"words": Words()}, {"llama3_405b_reward": "words"})


def rules(*given: Mapping[str, Any]) -> Rules:
    """A reward model of these rules."""
    return Rules(RulesConfig.read({"models": {"m": {"rules": list(given)}}}).models["m"])
