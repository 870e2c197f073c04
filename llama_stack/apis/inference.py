"""The Inference API: continue texts and answer dialogs, one at a time, in batches, whole or streamed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, JsonValue

from .common import (
    BaseModelName,
    ChatModelName,
    Content,
    Dialog,
    Id,
    Items,
    JsonObject,
    MaxTokens,
    Maybe,
    SamplingParams,
    Schema,
    StopReason,
    Text,
    ToolCall,
    ToolDefinition,
)
from .contract import Api, post
from .models import ServedModel


class CompletionRequest(Schema):
    """Continue a text with a base model."""

    content: Content
    model: BaseModelName
    sampling_params: SamplingParams = SamplingParams()
    max_tokens: MaxTokens = 0
    stream: bool = False
    logprobs: bool = False


class CompletionResponse(Schema, title="Normal completion response."):
    """The continuation. ``logprobs`` holds ``{tokens, token_logprobs, top_logprobs, text_offset}`` (spec rule G13)."""

    content: Content
    stop_reason: Maybe[StopReason] = None
    logprobs: Maybe[JsonObject] = None


class CompletionResponseStreamChunk(Schema, title="streamed completion response."):
    """A piece of the continuation; the last one carries the reason for the stop."""

    text_delta: str
    stop_reason: Maybe[StopReason] = None
    logprobs: Maybe[JsonObject] = None


class BatchCompletionRequest(Schema):
    """Continue several texts with one base model."""

    model: BaseModelName
    content_batch: Items[Content]
    sampling_params: SamplingParams = SamplingParams()
    max_tokens: MaxTokens = 0
    logprobs: bool = False


class ChatCompletionRequest(Schema):
    """Answer a dialog with a chat model."""

    model: ChatModelName
    dialog: Dialog
    sampling_params: SamplingParams = SamplingParams()
    available_tools: Items[ToolDefinition] = Field(default_factory=list)
    max_tokens: MaxTokens = 0
    stream: bool = False
    logprobs: bool = False


class ChatCompletionResponse(Schema, title="Normal chat completion response."):
    """The answer: text, calls of tools, or both."""

    content: Content
    stop_reason: Maybe[StopReason] = None
    tool_calls: Items[ToolCall]
    logprobs: Maybe[JsonObject] = None


class ChatCompletionResponseStreamChunk(
    Schema, title="Streamed chat completion response. The actual response is a series of such objects."
):
    """A piece of the answer: text, or one whole tool call; the last one carries the reason for the stop."""

    text_delta: str
    stop_reason: Maybe[StopReason] = None
    tool_call: Maybe[ToolCall] = None


class BatchChatCompletionRequest(Schema):
    """Answer several dialogs with one chat model."""

    model: ChatModelName
    batch_dialogs: Items[Dialog]
    sampling_params: SamplingParams = SamplingParams()
    available_tools: Items[ToolDefinition] = Field(default_factory=list)
    max_tokens: MaxTokens = 0
    logprobs: bool = False


class EmbeddingsRequest(Schema):
    """Turn texts into vectors."""

    model: Id
    contents: Items[Text]


class EmbeddingsResponse(Schema):
    """One vector a text, in the order of the texts."""

    embeddings: list[list[float]]


class AddAdapterRequest(Schema):
    """Serve a LoRA adapter on a model that is in memory already."""

    model: Id
    """The base model."""
    adapter: Id
    """The name under which it is served."""
    folder: Id
    """The folder of the adapter, one of those that the operator keeps for it."""


class RemoveAdapterRequest(Schema):
    """Stop serving an adapter."""

    model: Id
    """The adapter's name."""


@dataclass(frozen=True)
class LocalModel:
    """A model in a folder of this machine, as one provider tells another of it. It never goes over the wire."""

    model: str
    """The name that requests use."""
    folder: Path
    """Its weights, or where ``is_adapter`` the adapter's; absolute."""
    base: str | None = None
    """The model that it was made from: what an adapter runs on, and whose settings whole weights are served with."""
    is_adapter: bool = False
    aliases: tuple[str, ...] = ()
    """Other names for it."""
    lineage: Mapping[str, JsonValue] = field(default_factory=dict)
    """How it came about, for ``ServedModel.metadata``."""


class Inference(Api, name="inference", routed_by="model"):
    """Text generation by Llama models.

    Every operation raises ``ModelNotFoundError`` when no provider serves the model, ``ContextLengthError`` when the
    prompt does not fit, ``InvalidRequestError`` for attachments that the model cannot read, and ``OverloadedError``
    when the queue is full. Closing a returned iterator, or cancelling the call, stops the work within one decode step.
    """

    @abstractmethod
    async def models(self) -> list[ServedModel]:
        """The models that this provider serves now, aliases included."""

    async def owns(self, resource: str) -> bool:
        """Whether this provider serves the model."""
        return any(model.model == resource for model in await self.models())

    async def local_models(self) -> list[LocalModel]:
        """The folders behind the models that this provider serves, those that lie on this machine."""
        return []

    async def serve_local(self, model: LocalModel) -> bool:
        """Serve a model that this stack has made, from now on until the provider stops; the same again is a success.

        False where this provider does not serve ``model.base``, and so leaves it to others. Raises
        ``AlreadyExistsError`` where the name is taken, ``ConflictError`` where the base has as many adapters as it may,
        ``CheckpointError`` for the folder and ``SetupError`` where the machine has no room for it.
        """
        return False

    async def withdraw_local(self, model: str) -> bool:
        """Stop serving what ``serve_local`` began to serve; False where it is not served here, or others need it."""
        return False

    @post("/inference/completion")
    async def completion(
        self, request: CompletionRequest
    ) -> CompletionResponse | AsyncIterator[CompletionResponseStreamChunk]:
        """Continue a text."""

    @post("/inference/chat_completion")
    async def chat_completion(
        self, request: ChatCompletionRequest
    ) -> ChatCompletionResponse | AsyncIterator[ChatCompletionResponseStreamChunk]:
        """Answer a dialog."""

    @post("/inference/batch_completion")
    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        """Continue several texts; one line each, in the order of the request, as each is ready."""

    @post("/inference/batch_chat_completion")
    async def batch_chat_completion(self, request: BatchChatCompletionRequest) -> AsyncIterator[ChatCompletionResponse]:
        """Answer several dialogs; one line each, in the order of the request, as each is ready."""

    @post("/inference/embeddings", extension=True)
    async def embeddings(self, request: EmbeddingsRequest) -> EmbeddingsResponse:
        """Turn texts into vectors of one length."""

    @post("/inference/adapters/add", extension=True, names="adapter")
    async def add_adapter(self, request: AddAdapterRequest) -> ServedModel:
        """Serve an adapter from now on, until the server stops; the base and its other adapters answer meanwhile.

        Raises ``AlreadyExistsError`` where the name is taken and ``InvalidRequestError`` for a folder that holds no
        adapter for this model.
        """

    @post("/inference/adapters/remove", extension=True)
    async def remove_adapter(self, request: RemoveAdapterRequest) -> None:
        """Stop serving an adapter; requests that it has begun to answer are answered to the end."""
