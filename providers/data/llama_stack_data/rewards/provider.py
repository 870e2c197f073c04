"""The Reward API over scorers, each under the names that the distribution gives it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llama_stack.apis import RewardScoring, ServedModel
from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.models import ModelKind
from llama_stack.apis.reward_scoring import (
    KScoredPromptGenerations,
    PromptGenerations,
    RewardScoringRequest,
    RewardScoringResponse,
    ScoredMessage,
)
from llama_stack.errors import ModelNotFoundError


class Scorer(Protocol):
    """What scores the answers to a dialog."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What it is, for the catalogue of models."""
        ...

    async def scores(self, dialog: Dialog, answers: Sequence[Message]) -> list[float]:
        """A finite score for each answer, in their order; higher is better."""
        ...


class Rewards(RewardScoring):
    """Reward models by name. A dialog is scored whole before its scores are given, and all dialogs at a time."""

    def __init__(self, models: Mapping[str, Scorer], aliases: Mapping[str, str]) -> None:
        self._models = models
        self._aliases = aliases

    async def models(self) -> list[ServedModel]:
        served = [
            ServedModel(model=name, kind=ModelKind.REWARD, metadata=dict(scorer.metadata))
            for name, scorer in self._models.items()
        ]
        aliases = [
            ServedModel(model=alias, kind=ModelKind.REWARD, alias_of=name, metadata=dict(self._models[name].metadata))
            for alias, name in self._aliases.items()
        ]
        return served + aliases

    async def score(self, request: RewardScoringRequest) -> RewardScoringResponse:
        scorer = self._models.get(self._aliases.get(request.model, request.model))
        if scorer is None:
            raise ModelNotFoundError(request.model, [*self._models, *self._aliases])
        tasks: list[asyncio.Task[KScoredPromptGenerations]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(_scored(scorer, asked)) for asked in request.prompt_generations]
        except ExceptionGroup as failures:  # one is told: the others were cancelled, or failed alike
            raise failures.exceptions[0] from None
        return RewardScoringResponse(scored_generations=[task.result() for task in tasks])


async def _scored(scorer: Scorer, asked: PromptGenerations) -> KScoredPromptGenerations:
    scores = await scorer.scores(asked.dialog, asked.k_generations)
    return KScoredPromptGenerations(
        prompt=asked.dialog.message,
        k_scored_generations=[
            ScoredMessage(message=message, score=score)
            for message, score in zip(asked.k_generations, scores, strict=True)
        ],
    )
