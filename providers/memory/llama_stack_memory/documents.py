"""From a document to rows: its text, the chunks, their vectors. All of it happens before the store is locked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_stack.apis.memory_banks import MemoryBankDocument
from llama_stack.errors import FieldFault, InvalidRequestError, TooLargeError, UnreadableDocumentError

from .batches import BatchedEmbedder
from .extraction import Extractor
from .interfaces import Chunk, ChunkSettings, Vectors
from .tables import MAX_CHUNKS


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document with its chunks and their vectors."""

    document: MemoryBankDocument
    chunks: Sequence[Chunk]
    vectors_CD: Vectors


class Preparation:
    """Prepares documents with one embedder."""

    def __init__(self, extractor: Extractor, embedder: BatchedEmbedder) -> None:
        self._extractor = extractor
        self._embedder = embedder

    async def split(self, documents: Sequence[MemoryBankDocument], settings: ChunkSettings) -> list[list[Chunk]]:
        """The chunks of each document.

        Raises ``UnreadableDocumentError`` that points at the first document which cannot be read.
        """
        texts = [await self._text(number, document) for number, document in enumerate(documents)]
        split = await self._embedder.chunk(texts, settings)
        for document, chunks in zip(documents, split, strict=True):
            if len(chunks) > MAX_CHUNKS:
                raise TooLargeError(
                    f"document {document.uuid!r} has {len(chunks)} chunks; a document may have {MAX_CHUNKS}"
                )
        return split

    async def prepare(self, documents: Sequence[MemoryBankDocument], settings: ChunkSettings) -> list[Prepared]:
        """The documents with chunks and vectors. Raises as ``split`` does."""
        split = await self.split(documents, settings)
        vectors_TD = await self._embedder.embed([piece.text for chunks in split for piece in chunks])
        parts = np.split(vectors_TD, np.cumsum([len(chunks) for chunks in split])[:-1]) if split else []
        return [Prepared(d, chunks, part) for d, chunks, part in zip(documents, split, parts, strict=True)]

    async def _text(self, number: int, document: MemoryBankDocument) -> str:
        try:
            return await self._extractor.extract(document.content, document.mime_type)
        except UnreadableDocumentError as error:
            detail = f"document {document.uuid!r}: {error.detail}"
            faults = [FieldFault(f"/{number}/content", error.code, error.detail)]
            raise UnreadableDocumentError(detail, faults=faults) from None


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
