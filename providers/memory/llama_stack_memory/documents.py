"""From a document to rows: its text, the chunks, their vectors. All of it happens before the store is locked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_stack.apis.memory_banks import MemoryBankDocument
from llama_stack.errors import FieldFault, InvalidRequestError, TooLargeError, UnreadableDocumentError

from .chunking import chunk
from .extraction import extract
from .interfaces import Chunk, ChunkSettings, Embedder, Vectors
from .tables import MAX_CHUNKS

BATCH_TEXTS = 32
"""Texts embedded in one go; between two of them other requests get the embedder."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document with its chunks and their vectors."""

    document: MemoryBankDocument
    chunks: Sequence[Chunk]
    vectors_CD: Vectors


class Preparation:
    """Prepares documents with one embedder; requests take turns batch by batch."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._turn = asyncio.Lock()

    async def split(self, documents: Sequence[MemoryBankDocument], settings: ChunkSettings) -> list[list[Chunk]]:
        """The chunks of each document.

        Raises ``UnreadableDocumentError`` that points at the first document which cannot be read.
        """
        return [await self._split(number, document, settings) for number, document in enumerate(documents)]

    async def prepare(self, documents: Sequence[MemoryBankDocument], settings: ChunkSettings) -> list[Prepared]:
        """The documents with chunks and vectors. Raises as ``split`` does."""
        split = await self.split(documents, settings)
        vectors_TD = await self.embed([piece.text for chunks in split for piece in chunks])
        parts = np.split(vectors_TD, np.cumsum([len(chunks) for chunks in split])[:-1]) if split else []
        return [Prepared(d, chunks, part) for d, chunks, part in zip(documents, split, parts, strict=True)]

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """The vectors of the texts, off the event loop."""
        vectors = [np.empty((0, self.embedder.dimensions), np.float32)]
        for batch in _batches(texts):
            async with self._turn:
                vectors.append(await asyncio.to_thread(self.embedder.embed, batch))
        return np.concatenate(vectors)

    async def embed_query(self, text: str) -> Vectors:
        """The vector of a query; of one that is longer than the embedder reads, the mean of its pieces."""
        settings = ChunkSettings(self.embedder.max_tokens, 0)
        pieces = await asyncio.to_thread(lambda: chunk(text, self.embedder.token_spans(text), settings))
        sum_D: Vectors = (await self.embed([piece.text for piece in pieces])).sum(axis=0)
        sum_D /= np.linalg.norm(sum_D) or 1
        return sum_D

    async def _split(self, number: int, document: MemoryBankDocument, settings: ChunkSettings) -> list[Chunk]:
        try:
            text = await extract(document.content, document.mime_type)
        except UnreadableDocumentError as error:
            detail = f"document {document.uuid!r}: {error.detail}"
            faults = [FieldFault(f"/{number}/content", error.code, error.detail)]
            raise UnreadableDocumentError(detail, faults=faults) from None
        chunks = await asyncio.to_thread(lambda: chunk(text, self.embedder.token_spans(text), settings))
        if len(chunks) > MAX_CHUNKS:
            raise TooLargeError(
                f"document {document.uuid!r} has {len(chunks)} chunks; a document may have {MAX_CHUNKS}"
            )
        return chunks


def refuse_repeats(documents: Sequence[MemoryBankDocument]) -> None:
    """Raise ``InvalidRequestError`` when two documents of one request have the same id."""
    seen: set[str] = set()
    faults = []
    for number, document in enumerate(documents):
        if document.uuid in seen:
            faults.append(FieldFault(f"/{number}/uuid", "duplicate", f"{document.uuid!r} stands here a second time"))
        seen.add(document.uuid)
    if faults:
        raise InvalidRequestError("the ids of a request's documents must differ", faults=faults[:20])


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(texts), BATCH_TEXTS):
        yield texts[first : first + BATCH_TEXTS]
