"""The words that the parts of this package share: what embeds, and what a document is split into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:  # the plugin is imported to read its declarations, without numpy
    import numpy as np
    from numpy.typing import NDArray

Vectors: TypeAlias = "NDArray[np.float32]"
"""(texts, dimensions), or (dimensions,) for one."""
Span: TypeAlias = tuple[int, int]
"""Where a piece of a text begins and ends, in characters."""


class Embedder(Protocol):
    """Turns texts into vectors. Its methods compute and are called off the event loop."""

    name: str
    """Of the model; a bank remembers it."""
    dimensions: int
    max_tokens: int
    """How many tokens of a text it reads; a longer text is cut there."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One vector of length 1 for each text, in order; all zeros for a text that says nothing to the model."""

    def token_spans(self, text: str) -> list[Span]:
        """Where the tokens of ``text`` are, in order and without overlap; not cut at ``max_tokens``."""


@dataclass(frozen=True, slots=True)
class ChunkSettings:
    """How long the pieces of a document are, in tokens of the embedder."""

    tokens: int = 200
    """The most tokens of a chunk."""
    overlap: int = 40
    """How many tokens a chunk repeats of the one before it, at most."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document's text: ``text`` is what lies between the characters ``start`` and ``end``."""

    text: str
    start: int
    end: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Found:
    """A chunk that a search found, by its id, with its score; more is better."""

    chunk: int
    score: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that a search found, as it is shown."""

    document: str
    """The document's id."""
    text: str
    metadata: str
    """The document's, as JSON."""
    score: float


Values: TypeAlias = dict[str, Any]
"""Values for the named parameters of one statement."""
