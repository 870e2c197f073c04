"""The Inference API over our own engines, one for each base model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from prometheus_client.core import Metric
from pydantic import JsonValue

from llama_stack.apis.common import StopReason, ToolCall, ToolDefinition
from llama_stack.apis.inference import (
    AddAdapterRequest,
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
    Inference,
    LocalModel,
    RemoveAdapterRequest,
)
from llama_stack.apis.models import ModelKind, ServedModel
from llama_stack.errors import (
    AlreadyExistsError,
    CheckpointError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    ModelNotFoundError,
)

from ..config import MetaReferenceConfig
from .engine import Generation, Ticket
from .metrics import families
from .prompts import PromptEncoder
from .reply import Reply
from .serving import LoadedModel, running

T = TypeVar("T")
_Request = CompletionRequest | ChatCompletionRequest | BatchCompletionRequest | BatchChatCompletionRequest


@asynccontextmanager
async def serve(config: MetaReferenceConfig) -> AsyncIterator[MetaReferenceInference]:
    """Load the configured models one after another, and run their engines for the block."""
    models: dict[str, LoadedModel] = {}
    async with AsyncExitStack() as opened:
        encoder = PromptEncoder()
        opened.push_async_callback(encoder.close)
        for name, model_config in config.models.items():
            models[name] = await opened.enter_async_context(running(name, model_config))
        provider = MetaReferenceInference(models, encoder, config.aliases, config.adapters_root)
        opened.push_async_callback(provider.close)
        for base, model_config in config.models.items():
            for name, folder in model_config.adapter_folders.items():
                await provider.serve_adapter(name, base, folder)
        yield provider


@dataclass(frozen=True)
class _Served:
    """What a name stands for: a model, or an adapter on it."""

    model: LoadedModel
    adapter: int = 0
    folder: Path | None = None
    """Where the adapter lies."""
    lineage: Mapping[str, JsonValue] = field(default_factory=dict)
    """How it came about, where this stack has made it."""


class MetaReferenceInference(Inference):
    """Serves models, LoRA adapters on them, and aliases of both; every one answers texts and dialogs alike."""

    def __init__(
        self,
        models: dict[str, LoadedModel],
        encoder: PromptEncoder,
        aliases: Mapping[str, str],
        adapters_folder: Path | None,
    ) -> None:
        self._models = models
        self._encoder = encoder
        self._aliases = aliases
        self._adapters_folder = adapters_folder
        self._served = {name: _Served(model) for name, model in models.items()}
        self._added: dict[str, AsyncExitStack] = {}
        self._adding = asyncio.Lock()

    async def models(self) -> list[ServedModel]:
        """Models, adapters and aliases, each with its device, its context and what its checkpoint is."""
        listed = [_described(name, served) for name, served in self._served.items()]
        aliases = ((alias, name) for alias, name in self._aliases.items() if name in self._served)
        return listed + [_described(alias, self._served[name], alias_of=name) for alias, name in aliases]

    async def close(self) -> None:
        """Stop the models that came by ``serve_local``."""
        while self._added:
            await self._added.popitem()[1].aclose()

    async def local_models(self) -> list[LocalModel]:
        """All of them."""
        return [
            LocalModel(
                model=name,
                folder=served.folder or served.model.config.folder.absolute(),
                base=served.model.name if served.adapter else None,
                is_adapter=served.adapter > 0,
                aliases=tuple(alias for alias, model in self._aliases.items() if model == name),
                lineage=served.lineage,
            )
            for name, served in self._served.items()
        ]

    async def serve_local(self, model: LocalModel) -> bool:
        """Add an adapter to its base, or load whole weights into an engine of their own, set up as their base's."""
        base = self._aliases.get(model.base or "", model.base)
        if base not in self._models:
            return False
        if model.is_adapter:
            await self.serve_adapter(model.model, base, model.folder, model.lineage)
            return True
        async with self._adding:
            known = self._served.get(model.model)
            if known is None and model.model not in self._aliases:
                changed: dict[str, object] = {"checkpoint": str(model.folder), "adapters": {}, "draft": None}
                added = AsyncExitStack()
                config = self._models[base].config.model_copy(update=changed)
                loaded = await added.enter_async_context(running(model.model, config))
                self._added[model.model] = added
                self._models[model.model] = loaded
                self._served[model.model] = _Served(loaded, lineage=model.lineage)
            elif known is None or known.adapter or known.model.config.folder != model.folder:
                raise AlreadyExistsError("model", model.model, param="model")
        return True

    async def withdraw_local(self, model: str) -> bool:
        """Forget the name at once. What runs through an adapter ends in its time, what whole weights run is cut off."""
        served = self._served.get(model)
        if served is None or not served.lineage:
            return False
        if served.adapter:
            del self._served[model]
            served.model.engine.retire_adapter(served.adapter)
            return True
        if any(other.model is served.model and other.adapter for other in self._served.values()):
            return False
        del self._served[model], self._models[model]
        await self._added.pop(model).aclose()
        return True

    async def serve_adapter(
        self, name: str, base: str, folder: Path, lineage: Mapping[str, JsonValue] | None = None
    ) -> ServedModel:
        """Serve the adapter in a folder under a name from now on; the same again is a success.

        The folder's path is absolute. Raises ``AlreadyExistsError`` where the name is taken, ``ConflictError`` where
        the base has as many as it may, ``ModelNotFoundError`` for the base and ``CheckpointError`` for the folder.
        """
        if base not in self._models:
            raise ModelNotFoundError(base, self._models)
        async with self._adding:
            known = self._served.get(name)
            if known is None and name not in self._aliases:
                model = self._models[base]
                there = sum(served.model is model and served.adapter > 0 for served in self._served.values())
                if there >= model.config.max_adapters:
                    raise ConflictError(
                        f"model {base!r} has {model.config.max_adapters} adapters, its max_adapters; remove one"
                    )
                known = _Served(model, await model.engine.add_adapter(str(folder)), folder, lineage or {})
                self._served[name] = known
            elif known is None or (known.model.name, known.folder) != (base, folder):
                raise AlreadyExistsError("model", name, param="adapter")
        return _described(name, known)

    async def add_adapter(self, request: AddAdapterRequest) -> ServedModel:
        """Serve one of the adapters in ``adapters_folder``. Raises ``ForbiddenError`` where that is not set."""
        root = self._open_root()
        try:
            return await self.serve_adapter(request.adapter, request.model, _within(root, request.folder))
        except CheckpointError as error:  # where the folder lies is nothing for clients
            raise InvalidRequestError(str(error).replace(f"{root}/", ""), param="folder") from error

    async def remove_adapter(self, request: RemoveAdapterRequest) -> None:
        """Forget the name at once, and the adapter when nothing runs through it any more.

        Raises ``ForbiddenError`` where ``adapters_folder`` is not set: no request could bring it back.
        """
        self._open_root()
        served = self._served.get(request.model)
        if served is None or not served.adapter:
            raise ModelNotFoundError(request.model, [name for name, served in self._served.items() if served.adapter])
        del self._served[request.model]
        served.model.engine.retire_adapter(served.adapter)

    def _open_root(self) -> Path:
        if self._adapters_folder is None:
            raise ForbiddenError("no adapter comes or goes by request here: the distribution sets no adapters_folder")
        return self._adapters_folder

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
        served = self._named(request.model)
        model = served.model
        prompts = await self._encoder.texts(model, [("/content", request.content)])
        tickets = self._submit(served, prompts, request)
        if request.stream:
            return _Closing(_completion_chunks(tickets[0], Reply(model.tokenizer), request.logprobs), tickets)
        return await _whole_completion(tickets[0], Reply(model.tokenizer), request.logprobs)

    async def chat_completion(
        self, request: ChatCompletionRequest
    ) -> ChatCompletionResponse | AsyncIterator[ChatCompletionResponseStreamChunk]:
        """Answer a dialog; each call of a tool is one whole chunk, and the same streamed or not."""
        served = self._named(request.model)
        model = served.model
        prompts = await self._encoder.dialogs(model, [("/dialog", request.dialog)], request.available_tools)
        tickets = self._submit(served, prompts, request)
        reply = Reply(model.tokenizer, request.available_tools)
        if request.stream:
            return _Closing(_chat_chunks(tickets[0], reply), tickets)
        return await _whole_chat(tickets[0], reply, request.logprobs)

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        """Continue several texts at a time; one place in the queue for all of them."""
        served = self._named(request.model)
        model = served.model
        pointed = [(f"/content_batch/{index}", content) for index, content in enumerate(request.content_batch)]
        tickets = self._submit(served, await self._encoder.texts(model, pointed), request)

        async def lines() -> AsyncGenerator[CompletionResponse, None]:
            for ticket in tickets:
                yield await _whole_completion(ticket, Reply(model.tokenizer), request.logprobs)

        return _Closing(lines(), tickets)

    async def batch_chat_completion(self, request: BatchChatCompletionRequest) -> AsyncIterator[ChatCompletionResponse]:
        """Answer several dialogs at a time; one place in the queue for all of them."""
        served = self._named(request.model)
        model = served.model
        tools: Sequence[ToolDefinition] = request.available_tools
        pointed = [(f"/batch_dialogs/{index}", dialog) for index, dialog in enumerate(request.batch_dialogs)]
        tickets = self._submit(served, await self._encoder.dialogs(model, pointed, tools), request)

        async def lines() -> AsyncGenerator[ChatCompletionResponse, None]:
            for ticket in tickets:
                yield await _whole_chat(ticket, Reply(model.tokenizer, tools), request.logprobs)

        return _Closing(lines(), tickets)

    def _named(self, name: str) -> _Served:
        served = self._served.get(self._aliases.get(name, name))
        if served is None:
            raise ModelNotFoundError(name, [*self._served, *self._aliases])
        return served

    def _submit(self, served: _Served, prompts: list[list[int]], request: _Request) -> list[Ticket]:
        sampling, most, logprobs = request.sampling_params, request.max_tokens, request.logprobs
        # While the prompts were encoded the adapter may have been removed, and a step with it would fail for all.
        if self._named(request.model) is not served:
            raise ModelNotFoundError(request.model, [*self._served, *self._aliases])
        return served.model.engine.submit(
            [Generation(prompt, sampling, most, logprobs, served.adapter) for prompt in prompts]
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
    def chunk(text: str, stop_reason: StopReason) -> CompletionResponseStreamChunk:
        scores = reply.take_logprobs() if logprobs else None
        return CompletionResponseStreamChunk(text_delta=text, stop_reason=stop_reason, logprobs=scores)

    async with aclosing(_pieces(ticket, reply)) as pieces:
        async for piece in pieces:
            assert isinstance(piece, str), "without tools everything is text"
            yield chunk(piece, StopReason.NOT_STOPPED)
    yield chunk("", ticket.stop_reason)


async def _chat_chunks(ticket: Ticket, reply: Reply) -> AsyncGenerator[ChatCompletionResponseStreamChunk, None]:
    unfinished = StopReason.NOT_STOPPED
    async with aclosing(_pieces(ticket, reply)) as pieces:
        async for piece in pieces:
            if isinstance(piece, str):
                yield ChatCompletionResponseStreamChunk(text_delta=piece, stop_reason=unfinished)
            else:
                yield ChatCompletionResponseStreamChunk(text_delta="", stop_reason=unfinished, tool_call=piece)
    yield ChatCompletionResponseStreamChunk(text_delta="", stop_reason=ticket.stop_reason)


def _within(root: Path, name: str) -> Path:
    """The folder of that name in ``root``, which no name and no link leads out of."""
    folder = root / name
    if folder.parent != root or not name.strip(".") or not folder.resolve().is_relative_to(root.resolve()):
        raise InvalidRequestError(f"{name!r} is not the plain name of a folder of adapters", param="folder")
    return folder


def _described(name: str, served: _Served, alias_of: str | None = None) -> ServedModel:
    facts, engine = served.model.facts, served.model.engine
    metadata: dict[str, JsonValue] = {
        "layout": facts.layout,
        "dtype": facts.dtype,
        "kernels": facts.kernels,
        "parameters": facts.parameters,
        "weight_bytes": facts.weight_bytes,
        "cache_bytes": facts.cache_bytes,
        "cache_tokens": facts.blocks * facts.block_tokens,
        "trained_context_tokens": facts.trained_context,
        "restarts": engine.restarts,
    }
    if served.adapter:
        metadata["adapter_of"] = served.model.name
    metadata |= served.lineage
    return ServedModel(
        model=name,
        kind=ModelKind.LLM,
        alias_of=alias_of,
        device=facts.device,
        context_tokens=engine.context,
        metadata=metadata,
    )
