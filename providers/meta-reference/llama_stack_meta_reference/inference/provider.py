"""The Inference API over our own engines, one for each model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Generic, TypeVar

from prometheus_client.core import Metric

from llama_stack.apis.common import StopReason, ToolCall, ToolDefinition
from llama_stack.apis.inference import (
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
    Inference,
)
from llama_stack.apis.models import ModelKind, ServedModel
from llama_stack.errors import ModelNotFoundError

from ..config import MetaReferenceConfig
from .engine import Generation, Ticket
from .metrics import families
from .prompts import PromptEncoder
from .reply import Reply
from .serving import LoadedModel, load
from .workers import Workers

T = TypeVar("T")


@asynccontextmanager
async def serve(config: MetaReferenceConfig) -> AsyncIterator[MetaReferenceInference]:
    """Load the configured models one after another, off the event loop, and run their engines for the block.

    Whatever cuts a load short, its processes are ended.
    """
    models: dict[str, LoadedModel] = {}
    async with AsyncExitStack() as running:
        encoder = PromptEncoder()
        running.push_async_callback(encoder.close)
        for name, model_config in config.models.items():
            workers = Workers(name, model_config) if model_config.process == "own" else None
            if workers is not None:
                running.push_async_callback(asyncio.to_thread, workers.close)
            model = await asyncio.to_thread(load, name, model_config, workers)
            running.push_async_callback(model.engine.stop)
            model.engine.start()
            models[name] = model
        yield MetaReferenceInference(models, config.aliases, encoder)


class MetaReferenceInference(Inference):
    """Serves the models and their aliases; every model answers texts and dialogs alike."""

    def __init__(self, models: dict[str, LoadedModel], aliases: dict[str, str], encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._names = {name: name for name in models} | aliases
        self._models = models

    async def models(self) -> list[ServedModel]:
        """The models and their aliases, each with its device, its context and what its checkpoint is."""
        return [_described(name, self._models[model]) for name, model in self._names.items()]

    def unready_reason(self) -> str | None:
        """Which engine is being restarted, if any."""
        return next((trouble for model in self._models.values() if (trouble := model.engine.trouble)), None)

    def prometheus_metrics(self) -> Iterable[Metric]:
        """Latencies, token counts and the use of the cache, of each model."""
        return families({name: model.engine.metrics() for name, model in self._models.items()})

    async def completion(
        self, request: CompletionRequest
    ) -> CompletionResponse | AsyncIterator[CompletionResponseStreamChunk]:
        """Continue a text, which may end in the middle of a word."""
        model = self._model(request.model)
        prompts = await self._encoder.texts(model, [("/content", request.content)])
        tickets = _submit(model, prompts, request)
        if request.stream:
            return _Closing(_completion_chunks(tickets[0], Reply(model.tokenizer), request.logprobs), tickets)
        return await _whole_completion(tickets[0], Reply(model.tokenizer), request.logprobs)

    async def chat_completion(
        self, request: ChatCompletionRequest
    ) -> ChatCompletionResponse | AsyncIterator[ChatCompletionResponseStreamChunk]:
        """Answer a dialog; each call of a tool is one whole chunk, and the same streamed or not."""
        model = self._model(request.model)
        prompts = await self._encoder.dialogs(model, [("/dialog", request.dialog)], request.available_tools)
        tickets = _submit(model, prompts, request)
        reply = Reply(model.tokenizer, request.available_tools)
        if request.stream:
            return _Closing(_chat_chunks(tickets[0], reply), tickets)
        return await _whole_chat(tickets[0], reply, request.logprobs)

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        """Continue several texts at a time; one place in the queue for all of them."""
        model = self._model(request.model)
        pointed = [(f"/content_batch/{index}", content) for index, content in enumerate(request.content_batch)]
        tickets = _submit(model, await self._encoder.texts(model, pointed), request)

        async def lines() -> AsyncGenerator[CompletionResponse, None]:
            for ticket in tickets:
                yield await _whole_completion(ticket, Reply(model.tokenizer), request.logprobs)

        return _Closing(lines(), tickets)

    async def batch_chat_completion(self, request: BatchChatCompletionRequest) -> AsyncIterator[ChatCompletionResponse]:
        """Answer several dialogs at a time; one place in the queue for all of them."""
        model = self._model(request.model)
        tools: Sequence[ToolDefinition] = request.available_tools
        pointed = [(f"/batch_dialogs/{index}", dialog) for index, dialog in enumerate(request.batch_dialogs)]
        tickets = _submit(model, await self._encoder.dialogs(model, pointed, tools), request)

        async def lines() -> AsyncGenerator[ChatCompletionResponse, None]:
            for ticket in tickets:
                yield await _whole_chat(ticket, Reply(model.tokenizer, tools), request.logprobs)

        return _Closing(lines(), tickets)

    def _model(self, name: str) -> LoadedModel:
        if name not in self._names:
            raise ModelNotFoundError(name, self._names)
        return self._models[self._names[name]]


_Request = CompletionRequest | ChatCompletionRequest | BatchCompletionRequest | BatchChatCompletionRequest


def _submit(model: LoadedModel, prompts: list[list[int]], request: _Request) -> list[Ticket]:
    return model.engine.submit(
        [Generation(prompt, request.sampling_params, request.max_tokens, request.logprobs) for prompt in prompts]
    )


class _Closing(AsyncIterator[T], Generic[T]):
    """An iterator of chunks or lines. Closing it frees its places in the engine, also when it was never begun.

    A generator alone would not do: closing one that was not begun runs none of it.
    """

    def __init__(self, items: AsyncGenerator[T, None], tickets: Sequence[Ticket]) -> None:
        self._items = items
        self._tickets = tickets

    async def __anext__(self) -> T:
        try:
            return await self._items.__anext__()
        except BaseException:
            self._cancel()
            raise

    async def aclose(self) -> None:
        """Stop the work; safe to call more than once."""
        self._cancel()
        await self._items.aclose()

    def __del__(self) -> None:
        self._cancel()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()


async def _pieces(ticket: Ticket, reply: Reply) -> AsyncGenerator[str | ToolCall, None]:
    """Text and calls of a reply as they become certain."""
    try:
        async for sampled in ticket:
            for piece in reply.feed(sampled):
                yield piece
        for piece in reply.finish(is_cut=ticket.stop_reason is StopReason.MAX_TOKENS):
            yield piece
    finally:
        ticket.cancel()


async def _collected(ticket: Ticket, reply: Reply) -> tuple[str, list[ToolCall]]:
    async with aclosing(_pieces(ticket, reply)) as pieces:
        collected = [piece async for piece in pieces]
    calls = [piece for piece in collected if isinstance(piece, ToolCall)]
    return "".join(piece for piece in collected if isinstance(piece, str)), calls


async def _whole_completion(ticket: Ticket, reply: Reply, logprobs: bool) -> CompletionResponse:
    text, _ = await _collected(ticket, reply)
    scores = reply.take_logprobs() if logprobs else None
    return CompletionResponse(content=text, stop_reason=ticket.stop_reason, logprobs=scores)


async def _whole_chat(ticket: Ticket, reply: Reply, logprobs: bool) -> ChatCompletionResponse:
    text, calls = await _collected(ticket, reply)
    scores = reply.take_logprobs() if logprobs else None
    return ChatCompletionResponse(content=text, stop_reason=ticket.stop_reason, tool_calls=calls, logprobs=scores)


async def _completion_chunks(
    ticket: Ticket, reply: Reply, logprobs: bool
) -> AsyncGenerator[CompletionResponseStreamChunk, None]:
    def chunk(text: str) -> CompletionResponseStreamChunk:
        scores = reply.take_logprobs() if logprobs else None
        return CompletionResponseStreamChunk(text_delta=text, stop_reason=ticket.stop_reason, logprobs=scores)

    async with aclosing(_pieces(ticket, reply)) as pieces:
        async for piece in pieces:
            assert isinstance(piece, str), "without tools everything is text"
            yield chunk(piece)
    yield chunk("")


async def _chat_chunks(ticket: Ticket, reply: Reply) -> AsyncGenerator[ChatCompletionResponseStreamChunk, None]:
    unfinished = StopReason.NOT_STOPPED
    async with aclosing(_pieces(ticket, reply)) as pieces:
        async for piece in pieces:
            if isinstance(piece, str):
                yield ChatCompletionResponseStreamChunk(text_delta=piece, stop_reason=unfinished)
            else:
                yield ChatCompletionResponseStreamChunk(text_delta="", stop_reason=unfinished, tool_call=piece)
    yield ChatCompletionResponseStreamChunk(text_delta="", stop_reason=ticket.stop_reason)


def _described(name: str, model: LoadedModel) -> ServedModel:
    facts, engine = model.facts, model.engine
    return ServedModel(
        model=name,
        kind=ModelKind.LLM,
        alias_of=None if name == model.name else model.name,
        device=facts.device,
        context_tokens=engine.context,
        metadata={
            "layout": facts.layout,
            "dtype": facts.dtype,
            "kernels": facts.kernels,
            "parameters": facts.parameters,
            "weight_bytes": facts.weight_bytes,
            "cache_bytes": facts.cache_bytes,
            "cache_tokens": facts.blocks * facts.block_tokens,
            "trained_context_tokens": facts.trained_context,
            "restarts": engine.restarts,
        },
    )
