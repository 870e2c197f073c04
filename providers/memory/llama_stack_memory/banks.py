"""The MemoryBanks API over a database: what the operations mean, whichever way chunks are stored and searched.

A write prepares everything (text, chunks, vectors) before it locks the store; then it checks and applies the request in
one transaction, so that it is there whole, durable and searchable when it answers, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np

from llama_stack.apis import MemoryBanks
from llama_stack.apis.filters import Condition, parse_filter, sort_key
from llama_stack.apis.memory_banks import (
    ChunkOverlap,
    ChunkTokens,
    DocumentChunk,
    IndexKind,
    MemoryBank,
    MemoryBankDocument,
    QueryHit,
    QueryMode,
    QueryRequest,
    QueryResponse,
)
from llama_stack.errors import (
    AlreadyExistsError,
    ConflictError,
    FieldFault,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    listed,
)
from llama_stack.storage import Database

from .batches import BatchedEmbedder
from .config import MemoryConfig
from .documents import Preparation, Prepared, refuse_repeats
from .extraction import Extractor
from .interfaces import ChunkSettings, Embedder, Hit, Values, Vectors
from .sought import Sought, sought
from .tables import attribute_name
from .words import query_words

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")

MAX_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Bank:
    """A row of ``banks``."""

    id: int
    uuid: str
    name: str
    model: str
    dimensions: int
    chunk_tokens: int
    chunk_overlap: int
    kind: str
    """The kind of index."""
    request: bytes
    """A hash of the request that made the bank."""
    revision: int
    """Raised by every write."""

    @property
    def chunks(self) -> ChunkSettings:
        return ChunkSettings(self.chunk_tokens, self.chunk_overlap)


async def read_bank(connection: AsyncConnection, database: Database, uuid: str) -> Bank:
    """The bank of that id. Raises ``NotFoundError`` where there is none."""
    row = (await connection.execute(database.sql("SELECT * FROM {banks} WHERE uuid = :uuid"), {"uuid": uuid})).first()
    if row is None:
        raise NotFoundError(f"bank {uuid!r} does not exist here", param="bank_uuid")
    return Bank(**row._mapping)


async def read_same_bank(connection: AsyncConnection, database: Database, bank: Bank) -> Bank:
    """``bank`` as it is now. Raises ``NotFoundError``, or ``ConflictError`` where another has its id."""
    now = await read_bank(connection, database, bank.uuid)
    if now.id != bank.id:
        raise ConflictError(f"bank {bank.uuid!r} was dropped and made again meanwhile; send the request again")
    return now


class Chunks(Protocol):
    """Where chunks are stored and searched. What takes a ``connection`` is part of the caller's transaction.

    ``prepare`` makes what a new bank needs beside its rows, and ``discard`` removes it.
    """

    @property
    def kinds(self) -> Sequence[IndexKind]:
        """The kinds of index that there are."""

    async def prepare(self, connection: AsyncConnection, bank: Bank) -> None: ...
    async def discard(self, connection: AsyncConnection, bank: Bank) -> None: ...
    async def add(self, connection: AsyncConnection, bank: Bank, documents: Sequence[tuple[int, Prepared]]) -> None: ...
    async def remove(self, connection: AsyncConnection, documents: Sequence[int]) -> None: ...
    async def written(self, bank: Bank, removed: Sequence[int], added: Sequence[tuple[int, Prepared]]) -> None: ...
    def dropped(self, bank: Bank) -> None: ...

    async def find(self, bank: Bank, sought: Sought) -> list[Hit]:
        """What is sought in the bank as it is now, best first.

        Raises ``NotFoundError`` and ``ConflictError`` where it is no more.
        """


class DatabaseBanks(MemoryBanks):
    """Banks in the tables of one database.

    ``embedders`` are the models that banks may have; the first is the default.
    """

    def __init__(
        self,
        database: Database,
        chunks: Chunks,
        extractor: Extractor,
        embedders: Sequence[Embedder],
        config: MemoryConfig,
        notice: str | None = None,
    ) -> None:
        self._database = database
        self._chunks = chunks
        self._extractor = extractor
        self._embedders = {model.name: BatchedEmbedder(model) for model in embedders}
        self._default_model = embedders[0].name
        self._known: dict[str, Bank] = {}
        """Banks as a query last saw them; what is fixed stays so, and a search checks that it is the same bank."""
        self._config = config
        self._notice = notice

    def readiness_details(self) -> Mapping[str, str]:
        """That a stand-in embeds, if it does."""
        return {"notice": self._notice} if self._notice else {}

    async def owns(self, resource: str) -> bool:
        """Whether a bank of this id is here."""
        async with self._database.read() as connection:
            statement = self._database.sql("SELECT 1 FROM {banks} WHERE uuid = :uuid")
            return await connection.scalar(statement, {"uuid": resource}) is not None

    async def create(
        self,
        bank_uuid: str,
        bank_name: str,
        documents: list[MemoryBankDocument],
        embedding_model: str | None = None,
        chunk_tokens: ChunkTokens | None = None,
        chunk_overlap: ChunkOverlap | None = None,
        index: IndexKind | None = None,
    ) -> None:
        refuse_repeats(documents)
        request = _digest(bank_name, embedding_model, chunk_tokens, chunk_overlap, index, *map(_as_row, documents))
        async with self._database.read() as connection:
            if await self._is_repeated(connection, bank_uuid, request):
                return
        embedder = self._embedder(embedding_model or self._default_model)
        settings = self._settings(chunk_tokens, chunk_overlap)
        _check_settings(settings, embedder.model)
        kind = index or self._config.index
        if kind not in self._chunks.kinds:
            raise _invalid("?index", f"there is no {kind.value} here; there is: {listed(self._chunks.kinds)}")
        prepared = await Preparation(self._extractor, embedder).prepare(documents, settings)
        row: Values = {
            "uuid": bank_uuid,
            "name": bank_name,
            "model": embedder.model.name,
            "dimensions": embedder.model.dimensions,
            "chunk_tokens": settings.tokens,
            "chunk_overlap": settings.overlap,
            "kind": kind.value,
            "request": request,
            "revision": 0,
        }
        async with self._database.write() as connection:
            if await self._is_repeated(connection, bank_uuid, request):
                return
            row["id"] = await self._take_numbers(connection, 1)
            await connection.execute(
                self._database.sql(
                    "INSERT INTO {banks} VALUES (:id, :uuid, :name, :model, :dimensions, :chunk_tokens, :chunk_overlap,"
                    " :kind, :request, :revision)"
                ),
                row,
            )
            await self._chunks.prepare(connection, Bank(**row))
            await self._add(connection, Bank(**row), prepared)

    async def list_banks(self) -> AsyncIterator[MemoryBank]:
        async with self._database.read() as connection:
            rows = (await connection.execute(self._database.sql("SELECT uuid, name FROM {banks} ORDER BY id"))).all()
        return _each([MemoryBank(uuid=uuid, name=name) for uuid, name in rows])

    async def drop(self, bank_uuid: str) -> str:
        async with self._database.write(frees_space=True) as connection:
            bank = await read_bank(connection, self._database, bank_uuid)
            statement = self._database.sql("SELECT id FROM {documents} WHERE bank = :bank")
            await self._remove(connection, list(await connection.scalars(statement, {"bank": bank.id})))
            await self._chunks.discard(connection, bank)
            await connection.execute(self._database.sql("DELETE FROM {banks} WHERE id = :id"), {"id": bank.id})
        self._chunks.dropped(bank)
        self._known.pop(bank_uuid, None)
        return bank_uuid

    async def insert(self, bank_uuid: str, documents: list[MemoryBankDocument]) -> None:
        bank, prepared = await self._prepared(bank_uuid, documents)
        async with self._database.write() as connection:
            bank = await read_same_bank(connection, self._database, bank)
            numbers = await self._numbers(connection, bank, [document.uuid for document in documents])
            faults = _faults(documents, numbers.keys(), "exists", "exists already; update it, or choose another id")
            if faults:
                raise ConflictError(f"documents of these ids are in bank {bank_uuid!r} already", faults=faults)
            added = await self._add(connection, bank, prepared)
            await self._raise_revision(connection, bank)
        await self._chunks.written(bank, [], added)

    async def update(self, bank_uuid: str, documents: list[MemoryBankDocument]) -> None:
        bank, prepared = await self._prepared(bank_uuid, documents)
        async with self._database.write() as connection:
            bank = await read_same_bank(connection, self._database, bank)
            numbers = await self._numbers(connection, bank, [document.uuid for document in documents])
            missing = {document.uuid for document in documents} - numbers.keys()
            faults = _faults(documents, missing, "not_found", "does not exist; insert it")
            if faults:
                raise NotFoundError(f"documents of these ids are not in bank {bank_uuid!r}", faults=faults)
            removed = list(numbers.values())
            await self._remove(connection, removed)
            added = await self._add(connection, bank, prepared)
            await self._raise_revision(connection, bank)
        await self._chunks.written(bank, removed, added)

    async def get_documents(self, bank_uuid: str, document_uuids: list[str]) -> AsyncIterator[MemoryBankDocument]:
        return self._documents(await self._bank(bank_uuid), document_uuids)

    async def delete_documents(self, bank_uuid: str, document_uuids: list[str]) -> AsyncIterator[str]:
        async with self._database.write(frees_space=True) as connection:
            bank = await read_bank(connection, self._database, bank_uuid)
            numbers = await self._numbers(connection, bank, document_uuids)
            removed = list(numbers.values())
            if removed:
                await self._remove(connection, removed)
                await self._raise_revision(connection, bank)
        if removed:
            await self._chunks.written(bank, removed, [])
        return _each([uuid for uuid in dict.fromkeys(document_uuids) if uuid in numbers])

    async def query(self, request: QueryRequest) -> QueryResponse:
        condition = None if request.filter is None else parse_filter(request.filter)
        known = self._known.pop(request.bank_uuid, None)
        bank = known or await self._bank(request.bank_uuid)
        try:
            response = await self._query(bank, request, condition)
        except (NotFoundError, ConflictError, InvalidRequestError):
            if known is None:
                raise
            # It may have been dropped and made again, here or elsewhere, with another model too.
            bank = await self._bank(request.bank_uuid)
            response = await self._query(bank, request, condition)
        self._known[bank.uuid] = bank
        return response

    async def _query(self, bank: Bank, request: QueryRequest, condition: Condition | None) -> QueryResponse:
        words, vector_D = await self._terms(bank, request)
        hits = await self._chunks.find(bank, sought(words, vector_D, request.k, condition))
        return QueryResponse(hits=[_hit(hit) for hit in hits])

    async def preview(self, bank_uuid: str, documents: list[MemoryBankDocument]) -> AsyncIterator[DocumentChunk]:
        refuse_repeats(documents)
        bank = await self._bank(bank_uuid)
        split = await Preparation(self._extractor, self._embedder_of(bank)).split(documents, bank.chunks)
        return _each(
            DocumentChunk(document_uuid=document.uuid, text=c.text, start=c.start, end=c.end, tokens=c.tokens)
            for document, chunks in zip(documents, split, strict=True)
            for c in chunks
        )

    async def _terms(self, bank: Bank, request: QueryRequest) -> tuple[list[str] | None, Vectors | None]:
        """The words and the vector that are searched for. Raises ``InvalidRequestError`` for what has no meaning."""
        mode = request.mode
        if request.text is None and mode is QueryMode.KEYWORD:
            raise _invalid("/text", "a keyword query needs a text")
        words = None if request.text is None or mode is QueryMode.VECTOR else query_words(request.text)
        vector_D = None
        if request.embedding is not None:
            if mode is QueryMode.KEYWORD:
                raise _invalid(
                    "/embedding", "a keyword query takes no embedding; leave it out, or ask for another mode"
                )
            vector_D = _unit_vector(request.embedding, bank)
        elif request.text is not None and mode is not QueryMode.KEYWORD:
            vector_D = await self._embedder_of(bank).embed_query(request.text)
        return words, vector_D

    async def _bank(self, uuid: str) -> Bank:
        async with self._database.read() as connection:
            return await read_bank(connection, self._database, uuid)

    async def _prepared(self, uuid: str, documents: Sequence[MemoryBankDocument]) -> tuple[Bank, list[Prepared]]:
        refuse_repeats(documents)
        bank = await self._bank(uuid)
        preparation = Preparation(self._extractor, self._embedder_of(bank))
        return bank, await preparation.prepare(documents, bank.chunks)

    def _embedder(self, model: str) -> BatchedEmbedder:
        if model not in self._embedders:
            raise ModelNotFoundError(model, self._embedders)
        return self._embedders[model]

    def _embedder_of(self, bank: Bank) -> BatchedEmbedder:
        """Raises ``ConflictError`` when the model that the bank was made with is not here."""
        embedder = self._embedders.get(bank.model)
        if embedder is None or embedder.model.dimensions != bank.dimensions:
            here = (f"{e.model.name} ({e.model.dimensions} dimensions)" for e in self._embedders.values())
            raise ConflictError(
                f"bank {bank.uuid!r} was made with the embedding model {bank.model!r} of {bank.dimensions} dimensions;"
                f" here are: {listed(here)}. Configure that model, or make the bank again",
                param="bank_uuid",
            )
        return embedder

    def _settings(self, tokens: int | None, overlap: int | None) -> ChunkSettings:
        tokens = self._config.chunk_tokens if tokens is None else tokens
        return ChunkSettings(tokens, min(self._config.chunk_overlap, tokens // 2) if overlap is None else overlap)

    async def _is_repeated(self, connection: AsyncConnection, uuid: str, request: bytes) -> bool:
        statement = self._database.sql("SELECT request FROM {banks} WHERE uuid = :uuid")
        found = await connection.scalar(statement, {"uuid": uuid})
        if found not in (None, request):
            raise AlreadyExistsError("bank", uuid, param="bank_uuid")
        return found is not None

    async def _numbers(self, connection: AsyncConnection, bank: Bank, uuids: Sequence[str]) -> dict[str, int]:
        """The numbers of those documents that are in the bank, by id."""
        from sqlalchemy import bindparam

        if not uuids:
            return {}
        statement = self._database.sql(
            "SELECT uuid, id FROM {documents} WHERE bank = :bank AND uuid IN :uuids ORDER BY id"
        ).bindparams(bindparam("uuids", expanding=True))
        rows = await connection.execute(statement, {"bank": bank.id, "uuids": list(uuids)})
        return {row.uuid: row.id for row in rows}

    async def _add(
        self, connection: AsyncConnection, bank: Bank, prepared: Sequence[Prepared]
    ) -> list[tuple[int, Prepared]]:
        """Write documents with attributes and chunks; returns them with their numbers."""
        if not prepared:
            return []
        first = await self._take_numbers(connection, len(prepared))
        added = list(enumerate(prepared, first))
        await connection.execute(
            self._database.sql(
                "INSERT INTO {documents} (id, bank, uuid, mime_type, metadata, content)"
                " VALUES (:id, :bank, :uuid, :mime_type, :metadata, :content)"
            ),
            [{"id": number, "bank": bank.id, **_as_row(p.document)} for number, p in added],
        )
        attributes = [{"document": n, **row} for n, p in added for row in _attributes(p.document.metadata)]
        if attributes:
            statement = "INSERT INTO {attributes} (document, name, value) VALUES (:document, :name, :value)"
            await connection.execute(self._database.sql(statement), attributes)
        await self._chunks.add(connection, bank, added)
        return added

    async def _take_numbers(self, connection: AsyncConnection, count: int) -> int:
        """The first of ``count`` numbers in a row that nothing had before."""
        statement = self._database.sql("UPDATE {numbers} SET next = next + :count RETURNING next - :count")
        return cast(int, await connection.scalar(statement, {"count": count}))

    async def _remove(self, connection: AsyncConnection, numbers: Sequence[int]) -> None:
        """Remove documents with their attributes and chunks."""
        await self._chunks.remove(connection, numbers)
        if numbers:
            rows = [{"id": number} for number in numbers]
            await connection.execute(self._database.sql("DELETE FROM {attributes} WHERE document = :id"), rows)
            await connection.execute(self._database.sql("DELETE FROM {documents} WHERE id = :id"), rows)

    async def _raise_revision(self, connection: AsyncConnection, bank: Bank) -> None:
        statement = self._database.sql("UPDATE {banks} SET revision = revision + 1 WHERE id = :id")
        await connection.execute(statement, {"id": bank.id})

    async def _documents(self, bank: Bank, uuids: Sequence[str]) -> AsyncIterator[MemoryBankDocument]:
        """One at a time: together they may not fit the memory, and a slow client must not hold a transaction."""
        statement = self._database.sql(
            "SELECT uuid, content, metadata, mime_type FROM {documents} WHERE bank = :bank AND uuid = :uuid"
        )
        for uuid in uuids:
            async with self._database.read() as connection:
                row = (await connection.execute(statement, {"bank": bank.id, "uuid": uuid})).first()
            if row is not None:
                yield MemoryBankDocument(
                    uuid=row.uuid, content=row.content, metadata=json.loads(row.metadata), mime_type=row.mime_type
                )


def _as_row(document: MemoryBankDocument) -> Values:
    metadata = json.dumps(document.metadata, separators=(",", ":"))
    return {
        "uuid": document.uuid,
        "mime_type": document.mime_type,
        "metadata": metadata,
        "content": document.content,
    }


def _attributes(metadata: Mapping[str, Any]) -> Iterable[Values]:
    for name, value in metadata.items():
        encoded = sort_key(value)
        if encoded is not None:
            yield {"name": attribute_name(name), "value": encoded}


def _digest(*parts: Any) -> bytes:
    """A hash of the parts and where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        for value in part.values() if isinstance(part, dict) else [part]:
            data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8) + data)
    return digest.digest()


def _check_settings(settings: ChunkSettings, embedder: Embedder) -> None:
    if settings.tokens > embedder.max_tokens:
        raise _invalid("?chunk_tokens", f"{embedder.name} reads {embedder.max_tokens} tokens; ask for no more")
    if settings.overlap > settings.tokens // 2:
        raise _invalid("?chunk_overlap", f"more than half of a chunk of {settings.tokens} tokens; make it smaller")


def _unit_vector(embedding: Sequence[float], bank: Bank) -> Vectors:
    if len(embedding) != bank.dimensions:
        raise _invalid(
            "/embedding", f"it has {len(embedding)} numbers, and {bank.model} has {bank.dimensions} dimensions"
        )
    vector_D = np.array(embedding, dtype=np.float64)
    largest = np.abs(vector_D).max()
    if largest == 0:
        raise _invalid("/embedding", "all of it is zero, which points nowhere")
    vector_D /= largest  # so that no square overflows
    return (vector_D / np.linalg.norm(vector_D)).astype(np.float32)


def _faults(
    documents: Sequence[MemoryBankDocument], offending: Iterable[str], code: str, what: str
) -> list[FieldFault]:
    """A fault for each of the documents whose id is ``offending``, the first 20 of them."""
    wrong = set(offending)
    return [
        FieldFault(f"/{number}/uuid", code, f"document {document.uuid!r} {what}")
        for number, document in enumerate(documents)
        if document.uuid in wrong
    ][:MAX_FAULTS]


def _invalid(pointer: str, detail: str) -> InvalidRequestError:
    return InvalidRequestError(f"{pointer.strip('/?')}: {detail}", faults=[FieldFault(pointer, "validation", detail)])


def _hit(hit: Hit) -> QueryHit:
    return QueryHit(document_uuid=hit.document, text=hit.text, score=hit.score, metadata=json.loads(hit.metadata))


async def _each(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item
