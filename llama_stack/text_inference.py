"""Inference by one method: what a provider of a model subclasses when all it has is text that comes in pieces.

::

    class Echo(TextInference):
        names = ("echo",)

        async def pieces(self, messages, request):
            yield str(messages[-1].content)

Streams, whole answers, batches, ``max_tokens`` and unknown models follow from that. A provider that batches requests
together, or gives log-probabilities, implements ``Inference`` itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import ClassVar

from .apis import Inference, ServedModel
from .apis.common import Content, Message, StopReason, ToolCall
from .apis.inference import (
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
)
from .apis.models import ModelKind
from .errors import ModelNotFoundError

_Chunk = ChatCompletionResponseStreamChunk


class TextInference(Inference):
    """Subclass it, name the models and implement ``pieces``."""

    names: ClassVar[Sequence[str]] = ()
    """The models that it serves; set it on the class, or on the object where its config says which."""

    @abstractmethod
    def pieces(
        self, messages: Sequence[Message], request: ChatCompletionRequest | CompletionRequest
    ) -> AsyncGenerator[str | ToolCall, None]:
        """The answer to a dialog, as it is made: texts, each of which counts as a token, and whole calls of tools.

        A text to be continued comes as one message of the user's. ``request`` has the model, the tools and how tokens
        are picked. The generator is closed when nobody reads on.
        """

    async def models(self) -> list[ServedModel]:
        return [ServedModel(model=name, kind=ModelKind.LLM) for name in self.names]

    async def chat_completion(
        self, request: ChatCompletionRequest
    ) -> ChatCompletionResponse | AsyncIterator[ChatCompletionResponseStreamChunk]:
        self._check(request.model)
        chunks = _chunks(self.pieces(request.dialog.messages, request), request.max_tokens)
        return chunks if request.stream else await _whole(chunks)

    async def completion(
        self, request: CompletionRequest
    ) -> CompletionResponse | AsyncIterator[CompletionResponseStreamChunk]:
        self._check(request.model)
        chunks = _chunks(self.pieces([Message.user(request.content)], request), request.max_tokens)
        if request.stream:
            return _texts(chunks)
        whole = await _whole(chunks)
        return CompletionResponse(content=whole.content, stop_reason=whole.stop_reason)

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        self._check(request.model)

        def one(content: Content) -> CompletionRequest:
            return CompletionRequest(
                content=content,
                model=request.model,
                sampling_params=request.sampling_params,
                max_tokens=request.max_tokens,
            )

        async def lines() -> AsyncGenerator[CompletionResponse, None]:
            for content in request.content_batch:
                whole = await _whole(_chunks(self.pieces([Message.user(content)], one(content)), request.max_tokens))
                yield CompletionResponse(content=whole.content, stop_reason=whole.stop_reason)

        return lines()

    async def batch_chat_completion(self, request: BatchChatCompletionRequest) -> AsyncIterator[ChatCompletionResponse]:
        self._check(request.model)

        async def lines() -> AsyncGenerator[ChatCompletionResponse, None]:
            for dialog in request.batch_dialogs:
                one = ChatCompletionRequest(
                    dialog=dialog,
                    model=request.model,
                    sampling_params=request.sampling_params,
                    available_tools=request.available_tools,
                    max_tokens=request.max_tokens,
                )
                yield await _whole(_chunks(self.pieces(dialog.messages, one), request.max_tokens))

        return lines()

    def _check(self, model: str) -> None:
        if model not in self.names:
            raise ModelNotFoundError(model, self.names)


async def _chunks(made: AsyncGenerator[str | ToolCall, None], max_tokens: int) -> AsyncGenerator[_Chunk, None]:
    tokens = 0
    async with aclosing(made) as pieces:
        async for piece in pieces:
            if isinstance(piece, ToolCall):
                yield _Chunk(text_delta="", tool_call=piece)
            elif max_tokens and tokens == max_tokens:
                yield _Chunk(text_delta="", stop_reason=StopReason.MAX_TOKENS)
                return
            else:
                tokens += 1
                yield _Chunk(text_delta=piece)
    yield _Chunk(text_delta="", stop_reason=StopReason.FINISHED_OK)


async def _whole(stream: AsyncGenerator[_Chunk, None]) -> ChatCompletionResponse:
    async with aclosing(stream) as opened:
        chunks = [chunk async for chunk in opened]
    return ChatCompletionResponse(
        content="".join(chunk.text_delta for chunk in chunks),
        stop_reason=chunks[-1].stop_reason,
        tool_calls=[chunk.tool_call for chunk in chunks if chunk.tool_call is not None],
    )


async def _texts(stream: AsyncGenerator[_Chunk, None]) -> AsyncGenerator[CompletionResponseStreamChunk, None]:
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            yield CompletionResponseStreamChunk(text_delta=chunk.text_delta, stop_reason=chunk.stop_reason)
