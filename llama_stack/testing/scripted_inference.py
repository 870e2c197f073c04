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

from ..apis.common import Message, ToolCall
from ..apis.inference import (
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
)
from ..errors import NotProvidedError
from ..text_inference import TextInference

Part = str | ToolCall | Exception | asyncio.Event
"""A piece of text, a call, an error to raise in its place, or something to wait for."""
Answer = Sequence[Part]
SCRIPTED_MODEL = "scripted"


class ScriptedInference(TextInference):
    """Serves one model, whose answers to chat requests are given one by one, or by a function of the request.

    A request past the end of the script raises ``AssertionError``. A piece of text counts as one token: an answer with
    more of them than ``max_tokens`` is cut there.
    """

    names = (SCRIPTED_MODEL,)

    def __init__(self, *answers: Answer, by: Callable[[ChatCompletionRequest], Answer] | None = None) -> None:
        self.requests: list[ChatCompletionRequest] = []
        self.stopped = 0
        """Answers that were closed or cancelled before their end."""
        self._answers = list(answers)
        self._by = by

    def pieces(
        self, messages: Sequence[Message], request: ChatCompletionRequest | CompletionRequest
    ) -> AsyncGenerator[str | ToolCall, None]:
        assert isinstance(request, ChatCompletionRequest), "nothing else is answered"
        self.requests.append(request)
        return self._said(self._by(request) if self._by else self._next(), request.max_tokens)

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

    async def _said(self, answer: Answer, max_tokens: int) -> AsyncGenerator[str | ToolCall, None]:
        texts = 0
        try:
            for part in answer:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, asyncio.Event):
                    await part.wait()
                else:
                    texts += isinstance(part, str)
                    yield part
        except (asyncio.CancelledError, GeneratorExit):
            is_cut = max_tokens and texts > max_tokens  # the piece too many was taken, and no more are wanted
            self.stopped += not is_cut
            raise
