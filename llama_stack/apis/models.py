"""The Models API (an extension): which models this stack serves, under which names, where and by whom."""

from __future__ import annotations

from collections.abc import AsyncIterator

from pydantic import Field

from .common import Choice, Id, JsonObject, Label, Maybe, Schema
from .contract import Api, get


class ModelKind(Choice):
    """What a model is for."""

    LLM = "llm"
    EMBEDDING = "embedding"
    REWARD = "reward"


class ServedModel(Schema):
    """One name that requests may use, and what stands behind it."""

    model: Id
    """The name."""
    kind: ModelKind
    provider_id: Maybe[Id] = None
    """The provider that serves it; the stack fills it in."""
    alias_of: Maybe[Id] = None
    """The model that this name stands for, when it is an alias."""
    device: Maybe[Label] = None
    """Where it runs, such as ``cpu`` or ``cuda:0``."""
    context_tokens: Maybe[int] = None
    """The most tokens that prompt and answer may have together."""
    embedding_dimensions: Maybe[int] = None
    """The length of its vectors, for an embedding model."""
    metadata: JsonObject = Field(default_factory=dict)
    """What the provider says beyond that: weights, dtype, lineage."""


class Models(Api, name="models"):
    """The catalogue of what is served. The stack itself provides it from the providers that serve models."""

    @get("/models/list", extension=True)
    async def list_models(self) -> AsyncIterator[ServedModel]:
        """All models, sorted by name, aliases included."""
