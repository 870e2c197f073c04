"""The RewardScoring API by reward models on this machine: checkpoints as kind ``reward`` of the trainer leaves them.

A score is that of the last token of a dialog with its answer, written as chats are (llama/chat_format.py). The answers
of a request go through the network side by side, in portions of bounded size, in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import torch
from torch import nn

from llama_stack.apis import RewardScoring
from llama_stack.apis.models import ModelKind, ServedModel
from llama_stack.apis.reward_scoring import (
    KScoredPromptGenerations,
    RewardScoringRequest,
    RewardScoringResponse,
    ScoredMessage,
)
from llama_stack.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from llama_stack.storage.cancellation import in_thread

from .config import RewardConfig, RewardModelConfig
from .llama.checkpoint import load_model, load_score, open_checkpoint
from .llama.tokenizer import load_tokenizer
from .training.network import Network, freeze
from .training.ranks import device_of, product_type, products_in
from .training.samples import Encoder, Sample, pack, portions


class RewardModel:
    """A reward model in memory; one thread at a time may ask it."""

    def __init__(self, config: RewardModelConfig) -> None:
        """Read it. Raises ``CheckpointError`` and ``SetupError``."""
        checkpoint = open_checkpoint(config.folder, has_score=True)
        tokenizer = load_tokenizer(checkpoint.tokenizer)
        if tokenizer.vocab_size > checkpoint.config.vocab_size:
            raise CheckpointError(f"{checkpoint.folder}: the tokenizer has more tokens than the network")
        self.device = device_of(config.device)
        self.context = checkpoint.config.max_context
        self.parameters = checkpoint.config.parameter_count
        # One more than may be scored, so that what is too long can be told from what just fits.
        self.encoder = Encoder(tokenizer, self.context + 1)
        self._portion_tokens = config.portion_tokens
        score = nn.Linear(checkpoint.config.dim, 1, bias=False)
        score.weight = nn.Parameter(load_score(checkpoint))
        llama = load_model(checkpoint, device=self.device, dtype=checkpoint.dtype)
        self._network = Network(llama, score.to(self.device))
        freeze(self._network, is_rounded=False)
        self._dtype = product_type("auto", self.device)

    @torch.inference_mode()
    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """The score of each, in order."""
        found: list[float] = []
        for part, _ in portions([(sample,) for sample in samples], range(len(samples)), self._portion_tokens):
            with products_in(self._dtype, self.device):
                found += self._network(pack(part, self.device), "scores").tolist()
        return found


class LlamaRewards(RewardScoring):
    """Reward models by their names."""

    def __init__(self, models: Mapping[str, RewardModel], aliases: Mapping[str, str]) -> None:
        self._models, self._aliases = models, aliases
        self._turn = asyncio.Lock()

    async def models(self) -> list[ServedModel]:
        """Models and aliases."""
        names: dict[str, str | None] = {**dict.fromkeys(self._models), **self._aliases}
        return [
            ServedModel(
                model=name,
                kind=ModelKind.REWARD,
                alias_of=alias_of,
                device=str(model.device),
                context_tokens=model.context,
                metadata={"parameters": model.parameters},
            )
            for name, alias_of in names.items()
            for model in [self._models[alias_of or name]]
        ]

    async def score(self, request: RewardScoringRequest) -> RewardScoringResponse:
        """All answers with their scores, in the order of the request.

        Raises ``ModelNotFoundError``, and ``InvalidRequestError`` that names the answer for one that is longer than the
        model's context, is not of role assistant, or holds what a text model cannot be told.
        """
        model = self._models.get(self._aliases.get(request.model, request.model))
        if model is None:
            raise ModelNotFoundError(request.model, [*self._models, *self._aliases])
        async with self._turn:  # all cores work for one; it is held to the end of a thread whose client left
            scores = iter(await in_thread(_scores, model, request))
        return RewardScoringResponse(
            scored_generations=[
                KScoredPromptGenerations(
                    prompt=generations.dialog.message,
                    k_scored_generations=[
                        ScoredMessage(message=message, score=next(scores)) for message in generations.k_generations
                    ],
                )
                for generations in request.prompt_generations
            ]
        )


def _scores(model: RewardModel, request: RewardScoringRequest) -> list[float]:
    samples: list[Sample] = []
    for place, generations in enumerate(request.prompt_generations):
        for number, message in enumerate(generations.k_generations):
            where = f"prompt_generations/{place}/k_generations/{number}"
            try:
                samples.append(model.encoder.answer(generations.dialog.messages, message))
            except InvalidRequestError as error:
                raise InvalidRequestError(f"{where}: {error}") from None
            if len(samples[-1].tokens) > model.context:
                raise InvalidRequestError(
                    f"{where}: dialog and answer are longer than the model's context of {model.context} tokens"
                )
    return model.scores(samples)


@asynccontextmanager
async def serve(config: RewardConfig) -> AsyncIterator[RewardScoring]:
    """Read the models and yield the provider. Raises ``CheckpointError`` and ``SetupError``."""
    models = {name: await asyncio.to_thread(RewardModel, model) for name, model in config.models.items()}
    yield LlamaRewards(models, config.aliases)
