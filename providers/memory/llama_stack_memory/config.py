"""What a distribution may say of memory banks."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from llama_stack.apis import Config
from llama_stack.apis.memory_banks import IndexKind

from .interfaces import ChunkSettings

BUILTIN = ("builtin:minilm", "builtin:hashing")


class EmbeddingsConfig(Config):
    """Which model turns texts into vectors."""

    embedder: str = "auto"
    """`auto`: all-MiniLM-L6-v2 where its package is installed, else feature hashing. `builtin:minilm`,
    `builtin:hashing`, or the folder of a sentence model of the BERT family in Hugging Face's layout.
    """

    @field_validator("embedder")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value.startswith("builtin:") and value not in BUILTIN:
            raise ValueError(f"no embedder is called so; write one of {', '.join(BUILTIN)}, 'auto', or a folder")
        return value


class DocumentLimits(Config):
    """What a document may cost to read."""

    characters: int = Field(default=16_777_216, ge=1)
    """The most characters of its text."""
    ratio: float = Field(default=200, gt=0)
    """The most characters of its text for each byte of it, where the text has more than a million."""
    pages: int = Field(default=5_000, ge=1)
    """The most pages of a PDF."""
    seconds: float = Field(default=60, gt=0)
    """The longest that reading it may take."""
    memory_bytes: int = Field(default=1_073_741_824, ge=268_435_456)
    """The most memory of the process that reads it."""


class MemoryConfig(EmbeddingsConfig):
    """What a bank is made with when the request that creates it does not say; those that exist keep what they have."""

    chunk_tokens: int = Field(default=200, ge=16, le=8192)
    """The most tokens of a chunk, counted by the embedding model."""
    chunk_overlap: int = Field(default=40, ge=0, le=4096)
    """How many tokens a chunk repeats of the one before it, at most."""
    index: IndexKind = IndexKind.EXACT
    """How vectors are searched: `exact`, or `hnsw` where faiss-cpu is installed or the store is PostgreSQL."""

    documents: DocumentLimits = DocumentLimits()
    """What a document may cost to read; one that costs more is refused."""

    @model_validator(mode="after")
    def _overlap_is_less(self) -> MemoryConfig:
        if self.chunk_overlap > self.chunk_tokens // 2:
            raise ValueError("chunk_overlap is more than half of chunk_tokens; make it smaller")
        return self

    @property
    def chunks(self) -> ChunkSettings:
        """The sizes of chunks."""
        return ChunkSettings(self.chunk_tokens, self.chunk_overlap)
