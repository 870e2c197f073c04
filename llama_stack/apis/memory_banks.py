"""The MemoryBanks API: banks of documents that agents retrieve from.

A bank splits its documents into chunks, which are what a query finds. How it does (embedding model, sizes of chunks,
kind of index) is fixed when it is created; what the request leaves out, the provider's settings say.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from pydantic import Field

from .common import EXTENSION, Base64, Choice, Id, Items, JsonObject, Label, Maybe, Schema
from .contract import Api, delete, get, post


class MemoryBank(Schema):
    """A bank by its id, with the name that people know it by."""

    uuid: Id
    name: str


class MemoryBankDocument(Schema):
    """A document as it was stored: exactly these bytes come back."""

    inline = True

    uuid: Id
    content: Base64
    metadata: JsonObject
    mime_type: Label


class IndexKind(Choice):
    """How the vectors of a bank are searched."""

    EXACT = "exact"
    """Every vector is compared: nothing is missed."""
    HNSW = "hnsw"
    """A graph is walked: faster on large banks, and now and then a hit is missed (arXiv:1603.09320)."""


class QueryMode(Choice):
    """How a bank is searched."""

    VECTOR = "vector"
    """By cosine similarity to the embedding, or to that of the text."""
    KEYWORD = "keyword"
    """By the words of the text."""
    HYBRID = "hybrid"
    """Both, joined by their ranks; without a text as ``vector``."""


class QueryRequest(Schema):
    """Search one bank by a text or by an embedding of its model; with neither, list what the filter lets through."""

    bank_uuid: Id
    text: Maybe[Annotated[str, Field(max_length=100_000)]] = None
    embedding: Maybe[Annotated[list[float], Field(min_length=1, max_length=65_536)]] = None
    k: int = Field(default=5, ge=1, le=1_000)
    mode: QueryMode = QueryMode.HYBRID
    filter: Maybe[JsonObject] = None
    """A condition over the documents' metadata: ``{"eq": ["source", "atlas"]}``. See ``llama_stack.apis.filters``."""


class QueryHit(Schema):
    """A piece of a document that a query found."""

    document_uuid: Id
    text: str
    score: float
    metadata: JsonObject


class QueryResponse(Schema):
    """The best pieces first."""

    hits: Items[QueryHit]


class DocumentChunk(Schema):
    """A piece of a document as a bank would store it."""

    document_uuid: Id
    text: str
    start: int
    """Where it begins in the document's text, in characters."""
    end: int
    tokens: int
    """Its length in tokens of the bank's embedding model."""


ChunkTokens = Annotated[int, Field(ge=16, le=8192)]
"""The most tokens of a chunk, counted by the bank's embedding model."""
ChunkOverlap = Annotated[int, Field(ge=0, le=4096)]
"""How many tokens a chunk repeats of the one before it, at most."""


class MemoryBanks(Api, name="memory_banks", routed_by="bank_uuid"):
    """Banks of documents. Every write applies whole or not at all, and is durable and searchable when it answers.

    Operations on a bank raise ``NotFoundError`` when there is no such bank.
    """

    @post("/memory_banks/create", creates=True)
    async def create(
        self,
        bank_uuid: Id,
        bank_name: Id,
        documents: Items[MemoryBankDocument],
        embedding_model: Annotated[Maybe[Id], EXTENSION] = None,
        chunk_tokens: Annotated[Maybe[ChunkTokens], EXTENSION] = None,
        chunk_overlap: Annotated[Maybe[ChunkOverlap], EXTENSION] = None,
        index: Annotated[Maybe[IndexKind], EXTENSION] = None,
    ) -> None:
        """Create a bank holding these documents; an empty list creates an empty bank.

        The same request again is a success, another for that id raises ``AlreadyExistsError`` (spec rule G10). Raises
        ``ModelNotFoundError`` for an embedding model that is not served.
        """

    @get("/memory_banks/get")
    async def list_banks(self) -> AsyncIterator[MemoryBank]:
        """All banks."""

    @delete("/memory_banks/drop")
    async def drop(self, bank_uuid: Id) -> str:
        """Drop a bank and all it holds; answers with its id."""

    @post("/memory_bank/insert")
    async def insert(self, bank_uuid: Id, documents: Items[MemoryBankDocument]) -> None:
        """Add documents; raises ``ConflictError`` when one of the ids exists, and then adds none."""

    @post("/memory_bank/update")
    async def update(self, bank_uuid: Id, documents: Items[MemoryBankDocument]) -> None:
        """Replace whole documents; raises ``NotFoundError`` when one of the ids does not exist, and replaces none."""

    @post("/memory_bank/get")
    async def get_documents(self, bank_uuid: Id, document_uuids: Items[Id]) -> AsyncIterator[MemoryBankDocument]:
        """The documents of these ids in this order, missing ones skipped; no ids, no documents."""

    @post("/memory_bank/delete")
    async def delete_documents(self, bank_uuid: Id, document_uuids: Items[Id]) -> AsyncIterator[str]:
        """Delete documents; answers with the ids that were there. No ids, nothing deleted."""

    @post("/memory_bank/query", extension=True)
    async def query(self, request: QueryRequest) -> QueryResponse:
        """Search a bank."""

    @post("/memory_bank/preview", extension=True)
    async def preview(self, bank_uuid: Id, documents: Items[MemoryBankDocument]) -> AsyncIterator[DocumentChunk]:
        """The chunks that an insert of these documents would make; nothing is stored."""
