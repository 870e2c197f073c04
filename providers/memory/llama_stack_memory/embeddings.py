"""Inference that only embeds: the models of this package for whoever wants their vectors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NoReturn

from llama_stack.apis import Inference, ServedModel
from llama_stack.apis.inference import (
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
    EmbeddingsRequest,
    EmbeddingsResponse,
)
from llama_stack.apis.models import ModelKind
from llama_stack.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError

from .batches import BatchedEmbedder
from .config import EmbeddingsConfig
from .embedders import Chosen, choose_embedder


def load(config: EmbeddingsConfig) -> SentenceEmbeddings:
    """The provider. Loads the model: called off the event loop."""
    return SentenceEmbeddings(choose_embedder(config.embedder))


class SentenceEmbeddings(Inference):
    """Serves one embedding model; what asks it for text is refused."""

    def __init__(self, chosen: Chosen) -> None:
        self._notice = chosen.notice
        self._embedder = BatchedEmbedder(chosen.embedder)

    def readiness_details(self) -> Mapping[str, str]:
        """That a stand-in embeds, if it does."""
        return {"notice": self._notice} if self._notice else {}

    async def models(self) -> list[ServedModel]:
        embedder = self._embedder.model
        return [
            ServedModel(
                model=embedder.name,
                kind=ModelKind.EMBEDDING,
                device="cpu",
                context_tokens=embedder.max_tokens,
                embedding_dimensions=embedder.dimensions,
            )
        ]

    async def embeddings(self, request: EmbeddingsRequest) -> EmbeddingsResponse:
        self._check(request.model)
        await asyncio.to_thread(self._refuse_long, request.contents)
        vectors = await self._embedder.embed(request.contents)
        return EmbeddingsResponse(embeddings=vectors.tolist())

    async def completion(
        self, request: CompletionRequest
    ) -> CompletionResponse | AsyncIterator[CompletionResponseStreamChunk]:
        self._refuse(request.model)

    async def chat_completion(
        self, request: ChatCompletionRequest
    ) -> ChatCompletionResponse | AsyncIterator[ChatCompletionResponseStreamChunk]:
        self._refuse(request.model)

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        self._refuse(request.model)

    async def batch_chat_completion(self, request: BatchChatCompletionRequest) -> AsyncIterator[ChatCompletionResponse]:
        self._refuse(request.model)

    def _check(self, model: str) -> None:
        if model != self._embedder.model.name:
            raise ModelNotFoundError(model, [self._embedder.model.name])

    def _refuse(self, model: str) -> NoReturn:
        self._check(model)
        raise InvalidRequestError(f"model {model!r} turns texts into vectors and writes none", param="model")

    def _refuse_long(self, texts: Sequence[str]) -> None:
        """Nothing is cut in silence: an embedding of half a text would pass for one of the whole."""
        limit = self._embedder.model.max_tokens
        for number, text in enumerate(texts):
            tokens = len(self._embedder.model.token_spans(text))
            if tokens > limit:
                raise ContextLengthError(tokens, limit + 1, pointer=f"/contents/{number}")
