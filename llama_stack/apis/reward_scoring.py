"""The RewardScoring API: score answers by a reward model."""

from __future__ import annotations

from abc import abstractmethod

from .common import Dialog, Items, Message, RewardModelName, Schema
from .contract import Api, post
from .models import ServedModel


class PromptGenerations(Schema):
    """A dialog and the answers to score."""

    inline = True

    dialog: Dialog
    k_generations: Items[Message]


class RewardScoringRequest(
    Schema, title="Request to score a reward function. A list of prompts and a list of responses per prompt."
):
    """Score answers to several dialogs."""

    prompt_generations: Items[PromptGenerations]
    model: RewardModelName


class ScoredMessage(Schema):
    """An answer and its score; higher is better."""

    message: Message
    score: float


class KScoredPromptGenerations(Schema):
    """A prompt (the message of its dialog) and its scored answers, in the order of the request."""

    prompt: Message
    k_scored_generations: Items[ScoredMessage]


class RewardScoringResponse(
    Schema,
    title="Response from the reward scoring. Batch of (prompt, response, score) tuples that pass the threshold.",
):
    """All answers with their scores, in the order of the request."""

    scored_generations: Items[KScoredPromptGenerations]


class RewardScoring(Api, name="reward_scoring", routed_by="model"):
    """Scores by reward models."""

    @abstractmethod
    async def models(self) -> list[ServedModel]:
        """The reward models that this provider serves now, aliases included."""

    async def owns(self, resource: str) -> bool:
        """Whether this provider serves the model."""
        return any(model.model == resource for model in await self.models())

    @post("/reward_scoring/score")
    async def score(self, request: RewardScoringRequest) -> RewardScoringResponse:
        """Score answers; raises ``ModelNotFoundError``."""
