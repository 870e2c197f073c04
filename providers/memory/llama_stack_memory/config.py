"""What a distribution may say of memory banks."""

from __future__ import annotations

from pydantic import Field, model_validator

from llama_stack.apis import Config
from llama_stack.apis.memory_banks import IndexKind

from .interfaces import ChunkSettings


class MemoryConfig(Config):
    """What a bank is made with when the request that creates it does not say; those that exist keep what they have."""

    chunk_tokens: int = Field(default=200, ge=16, le=8192)
    """The most tokens of a chunk, counted by the embedding model."""
    chunk_overlap: int = Field(default=40, ge=0, le=4096)
    """How many tokens a chunk repeats of the one before it, at most."""
    index: IndexKind = IndexKind.EXACT
    """How vectors are searched: `exact`."""

    @model_validator(mode="after")
    def _overlap_is_less(self) -> MemoryConfig:
        if self.chunk_overlap > self.chunk_tokens // 2:
            raise ValueError("chunk_overlap is more than half of chunk_tokens; make it smaller")
        return self

    @property
    def chunks(self) -> ChunkSettings:
        """The sizes of chunks."""
        return ChunkSettings(self.chunk_tokens, self.chunk_overlap)
