"""Inference with scripted answers: what tests and benchmarks run in place of a model.

``StubInference`` counts what it does, can be made slow, made to wait and made to fail. ``stub`` is a plugin that
declares it as the provider ``stub``: ``Registry(discover(extra=[stub]))``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from pydantic import Field

from ..apis import Config, Inference, ServedModel
from ..apis.common import StopReason
from ..apis.inference import (
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
from ..apis.models import ModelKind
from ..errors import ModelNotFoundError
from ..plugins import ProviderSpec, hookimpl

STUB_MODELS = ("stub", "llama3_8b", "llama3_70b", "llama3_8b_chat", "llama3_70b_chat")


class StubConfig(Config):
    """How the stub answers."""

    models: tuple[str, ...] = STUB_MODELS
    """The models that it serves."""
    pieces: tuple[str, ...] = ("Hello", " from", " the", " stub.")
    """The answer to everything, one piece a step; a whole answer is the pieces joined."""
    repeat: int = Field(default=1, ge=1)
    """How often the pieces are said."""
    delay_seconds: float = Field(default=0.0, ge=0)
    """How long each step takes."""


class StubInference(Inference):
    """Answers every request with the same pieces, and counts; its attributes may be changed between requests.

    ``steps`` are the steps taken, ``finished`` the answers that came to their end and ``stopped`` those that were ended
    before it. With ``permits`` each step takes one first, so that a test says when it happens. A ``failure`` is raised
    in place of step number ``fail_at``.
    """

    def __init__(self, config: StubConfig | None = None) -> None:
        self.config = config or StubConfig()
        self.permits: asyncio.Semaphore | None = None
        self.failure: BaseException | None = None
        self.fail_at = 0
        self.steps = 0
        self.finished = 0
        self.stopped = 0
        self._changed = asyncio.Event()

    async def until(self, *, steps: int = 0, finished: int = 0, stopped: int = 0) -> None:
        """Wait until the stub has counted at least this much."""
        while self.steps < steps or self.finished < finished or self.stopped < stopped:
            self._changed.clear()
            await self._changed.wait()

    async def models(self) -> list[ServedModel]:
        return [ServedModel(model=name, kind=ModelKind.LLM) for name in self.config.models]

    async def completion(
        self, request: CompletionRequest
    ) -> CompletionResponse | AsyncIterator[CompletionResponseStreamChunk]:
        self._check(request.model)
        if request.stream:
            return self._completion_chunks()
        return CompletionResponse(content=await self._whole(), stop_reason=StopReason.FINISHED_OK)

    async def chat_completion(
        self, request: ChatCompletionRequest
    ) -> ChatCompletionResponse | AsyncIterator[ChatCompletionResponseStreamChunk]:
        self._check(request.model)
        if request.stream:
            return self._chat_chunks()
        return ChatCompletionResponse(content=await self._whole(), stop_reason=StopReason.FINISHED_OK, tool_calls=[])

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        self._check(request.model)
        return self._completions(len(request.content_batch))

    async def batch_chat_completion(self, request: BatchChatCompletionRequest) -> AsyncIterator[ChatCompletionResponse]:
        self._check(request.model)
        return self._chats(len(request.batch_dialogs))

    async def embeddings(self, request: EmbeddingsRequest) -> EmbeddingsResponse:
        self._check(request.model)
        return EmbeddingsResponse(embeddings=[[float(len(text)), 1.0] for text in request.contents])

    def _check(self, model: str) -> None:
        if model not in self.config.models:
            raise ModelNotFoundError(model, self.config.models)

    async def _whole(self) -> str:
        async with aclosing(self._pieces()) as pieces:
            return "".join([piece async for piece, _ in pieces])

    async def _completion_chunks(self) -> AsyncIterator[CompletionResponseStreamChunk]:
        async with aclosing(self._pieces()) as pieces:
            async for piece, reason in pieces:
                yield CompletionResponseStreamChunk(text_delta=piece, stop_reason=reason)

    async def _chat_chunks(self) -> AsyncIterator[ChatCompletionResponseStreamChunk]:
        async with aclosing(self._pieces()) as pieces:
            async for piece, reason in pieces:
                yield ChatCompletionResponseStreamChunk(text_delta=piece, stop_reason=reason)

    async def _completions(self, count: int) -> AsyncIterator[CompletionResponse]:
        for _ in range(count):
            yield CompletionResponse(content=await self._whole(), stop_reason=StopReason.FINISHED_OK)

    async def _chats(self, count: int) -> AsyncIterator[ChatCompletionResponse]:
        for _ in range(count):
            text = await self._whole()
            yield ChatCompletionResponse(content=text, stop_reason=StopReason.FINISHED_OK, tool_calls=[])

    async def _pieces(self) -> AsyncGenerator[tuple[str, StopReason], None]:
        pieces = self.config.pieces * self.config.repeat
        try:
            for number, piece in enumerate(pieces):
                if self.permits is not None:
                    await self.permits.acquire()
                if self.config.delay_seconds:
                    await asyncio.sleep(self.config.delay_seconds)
                if self.failure is not None and number == self.fail_at:
                    raise self.failure
                self.steps += 1
                self._changed.set()
                yield piece, StopReason.FINISHED_OK if number == len(pieces) - 1 else StopReason.NOT_STOPPED
            self.finished += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped += 1
            raise
        finally:
            self._changed.set()


class StubPlugin:
    """The plugin that declares the provider ``stub``, and keeps what it has started for tests to look at."""

    __name__ = "stub"

    def __init__(self) -> None:
        self.started: list[StubInference] = []

    @hookimpl
    def llama_stack_providers(self) -> list[ProviderSpec]:
        """One provider of ``inference``."""

        @asynccontextmanager
        async def start_stub(config: StubConfig) -> AsyncIterator[Inference]:
            self.started.append(StubInference(config))
            yield self.started[-1]

        return [ProviderSpec(api=Inference, name="stub", config=StubConfig, start=start_stub)]


stub = StubPlugin()
