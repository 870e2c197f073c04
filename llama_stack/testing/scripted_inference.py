"""Inference that says what a test wrote down: text, calls of tools, a pause, a failure; in order, plain or streamed.

Where ``StubInference`` answers everything alike, this one plays the model of an agent or of a guard::

    model = ScriptedInference(
        [ToolCall(tool_name="math", arguments={"expression": "17 * 23"})],   # the first answer
        ["17 * 23 is ", "391."],                                             # the second, in two pieces
    )
    model.requests                                                           # what it was asked
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing

from ..apis import Inference, ServedModel
from ..apis.common import StopReason, ToolCall
from ..apis.inference import (
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
)
from ..apis.models import ModelKind
from ..errors import ModelNotFoundError, NotProvidedError

Part = str | ToolCall | Exception | asyncio.Event
"""A piece of text, a call, an error to raise in its place, or something to wait for."""
Answer = Sequence[Part]
SCRIPTED_MODEL = "scripted"


class ScriptedInference(Inference):
    """Serves one model, whose answers to chat requests are given one by one, or by a function of the request.

    A request past the end of the script raises ``AssertionError``. A piece of text counts as one token: an answer with
    more of them than ``max_tokens`` is cut there.
    """

    def __init__(self, *answers: Answer, by: Callable[[ChatCompletionRequest], Answer] | None = None) -> None:
        self.requests: list[ChatCompletionRequest] = []
        self.stopped = 0
        """Answers that were closed or cancelled before their end."""
        self._answers = list(answers)
        self._by = by

    async def models(self) -> list[ServedModel]:
        return [ServedModel(model=SCRIPTED_MODEL, kind=ModelKind.LLM)]

    async def chat_completion(
        self, request: ChatCompletionRequest
    ) -> ChatCompletionResponse | AsyncIterator[ChatCompletionResponseStreamChunk]:
        if request.model != SCRIPTED_MODEL:
            raise ModelNotFoundError(request.model, [SCRIPTED_MODEL])
        self.requests.append(request)
        answer = self._by(request) if self._by else self._next()
        if request.stream:
            return self._chunks(answer, request.max_tokens)
        async with aclosing(self._chunks(answer, request.max_tokens)) as stream:
            chunks = [chunk async for chunk in stream]
        return ChatCompletionResponse(
            content="".join(chunk.text_delta for chunk in chunks),
            stop_reason=chunks[-1].stop_reason,
            tool_calls=[chunk.tool_call for chunk in chunks if chunk.tool_call],
        )

    async def completion(
        self, request: CompletionRequest
    ) -> CompletionResponse | AsyncIterator[CompletionResponseStreamChunk]:
        raise NotProvidedError("the script holds answers to chats")

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        raise NotProvidedError("the script holds answers to chats")

    async def batch_chat_completion(self, request: BatchChatCompletionRequest) -> AsyncIterator[ChatCompletionResponse]:
        raise NotProvidedError("the script holds answers to chats, one by one")

    def _next(self) -> Answer:
        assert self._answers, f"the script ends before request {len(self.requests)}"
        return self._answers.pop(0)

    async def _chunks(self, answer: Answer, max_tokens: int) -> AsyncGenerator[ChatCompletionResponseStreamChunk, None]:
        tokens = 0
        try:
            for part in answer:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, asyncio.Event):
                    await part.wait()
                elif isinstance(part, ToolCall):
                    yield ChatCompletionResponseStreamChunk(text_delta="", tool_call=part)
                elif max_tokens and tokens == max_tokens:
                    yield ChatCompletionResponseStreamChunk(text_delta="", stop_reason=StopReason.MAX_TOKENS)
                    return
                else:
                    tokens += 1
                    yield ChatCompletionResponseStreamChunk(text_delta=part)
            yield ChatCompletionResponseStreamChunk(text_delta="", stop_reason=StopReason.FINISHED_OK)
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped += 1
            raise
