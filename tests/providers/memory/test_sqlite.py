"""The embedded store keeps the contract, and what is its own: an index in memory that follows the table."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from llama_stack_memory import MemoryConfig
from llama_stack_memory.banks import DatabaseBanks
from llama_stack_memory.embedders import HashingEmbedder
from llama_stack_memory.extraction import Extractor
from llama_stack_memory.provider import serve_sqlite
from llama_stack_memory.sqlite_chunks import SqliteChunks
from llama_stack_memory.vectors import has_faiss, hnsw

from llama_stack.apis import MemoryBanks
from llama_stack.apis.memory_banks import IndexKind, QueryMode, QueryRequest
from llama_stack.distribution import Distribution
from llama_stack.errors import ConflictError, InvalidRequestError, ModelNotFoundError, SetupError, StorageFullError
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from llama_stack.storage import Database, open_store
from llama_stack.testing.memory_banks import ATLAS, MemoryBanksConformance, all_of, contents, document, found, hits
from tests.draft_schemas import DraftSchemas

pytestmark = pytest.mark.anyio

HASHING = MemoryConfig(embedder="builtin:hashing")


class TestSqlite(MemoryBanksConformance):
    """Everything that any provider must keep to."""

    config = HASHING

    @asynccontextmanager
    async def open(self, folder: Path) -> AsyncIterator[MemoryBanks]:
        async with (
            open_store("sqlite", folder) as store,
            serve_sqlite(self.config, store.database("memory_banks.sqlite")) as banks,
        ):
            yield banks


@pytest.mark.skipif(not has_faiss(), reason="faiss-cpu is not installed")
class TestSqliteWithGraph(TestSqlite):
    """The same with banks that are searched by a graph, from a few rows on."""

    config = MemoryConfig(embedder="builtin:hashing", index=IndexKind.HNSW)
    is_exact = False

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hnsw, "SMALL_ROWS", 8)


async def test_a_kind_of_index_that_is_not_here_is_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the settings when the stack starts, in a request when it comes; a bank that has it is searched exactly."""
    graph = MemoryConfig(embedder="builtin:hashing", index=IndexKind.HNSW)
    async with serve_sqlite(HASHING, database) as banks:
        await banks.create("atlas", "Atlas", list(ATLAS), index=IndexKind.HNSW if has_faiss() else None)
    monkeypatch.setattr("llama_stack_memory.sqlite_chunks.has_faiss", lambda: False)
    with pytest.raises(SetupError, match="install faiss-cpu"):
        await serve_sqlite(graph, database).__aenter__()
    async with serve_sqlite(HASHING, database) as banks:
        with pytest.raises(InvalidRequestError, match="there is no hnsw here; there is: exact"):
            await banks.create("new", "New", [], index=IndexKind.HNSW)
        assert await found(banks, "atlas", "the capital of Norway", k=1) == ["oslo"]


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with open_store("sqlite", tmp_path / "state") as store:
        yield store.database("memory_banks.sqlite")


async def rows(database: Database) -> dict[str, int]:
    """How many rows each table has."""
    tables = ("banks", "documents", "attributes", "chunks", "texts")
    async with database.read() as connection:
        return {t: await connection.scalar(database.sql(f"SELECT count(*) FROM {{{t}}}")) or 0 for t in tables}


async def test_what_was_deleted_leaves_no_row(database: Database) -> None:
    """Orphans would fill the disk, and one join too few would find them."""
    async with serve_sqlite(HASHING, database) as banks:
        empty = await rows(database)
        await banks.create("atlas", "Atlas", list(ATLAS))
        before = await rows(database)
        assert before == {"banks": 1, "documents": 3, "attributes": 3, "chunks": 3, "texts": 3}
        await banks.insert("atlas", [document("a", "One. " * 1000, {"x": 1, "y": "z", "list": []})])
        await banks.update("atlas", [document("a", "Two. " * 2000, {"x": 1})])
        await all_of(await banks.delete_documents("atlas", ["a"]))
        assert await rows(database) == before
        await banks.drop("atlas")
        assert await rows(database) == empty


async def test_an_index_follows_what_another_process_writes(tmp_path: Path) -> None:
    """Two servers on one file: each keeps an index of its own and must not answer from an old one."""
    async with open_store("sqlite", tmp_path) as one_store, open_store("sqlite", tmp_path) as other_store:
        name = "memory_banks.sqlite"
        async with (
            serve_sqlite(HASHING, one_store.database(name)) as one,
            serve_sqlite(HASHING, other_store.database(name)) as other,
        ):
            await one.create("atlas", "Atlas", list(ATLAS))
            for mode in QueryMode:
                assert await found(other, "atlas", "the capital of Norway", mode=mode, k=1) == ["oslo"]
            await other.update("atlas", [document("oslo", "A fjord.")])
            await all_of(await one.delete_documents("atlas", ["rome"]))
            await other.insert("atlas", [document("lima", "Lima is the capital of Peru.")])
            for banks in (one, other):
                got = await hits(banks, "atlas", "capital", mode=QueryMode.VECTOR, k=10)
                assert {hit.document_uuid for hit in got} == {"oslo", "bergen", "lima"}
                assert got[0].text == "Lima is the capital of Peru."
            await one.drop("atlas")
            await other.create("atlas", "Again", [document("new", "New.")])
            assert await found(one, "atlas", "capital") == ["new"]


async def test_a_write_that_fails_changes_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever statement the disk is full."""
    async with serve_sqlite(HASHING, database) as banks:
        await banks.create("atlas", "Atlas", list(ATLAS))
        before = await rows(database), await hits(banks, "atlas", k=100)

        async def fail(*args: Any) -> None:
            await add(*args)
            raise StorageFullError("no room")

        add = SqliteChunks.add
        monkeypatch.setattr(SqliteChunks, "add", fail)
        for call in (
            banks.insert("atlas", [document("new", "New.")]),
            banks.update("atlas", [document("oslo", "Changed.")]),
            banks.create("other", "Other", [document("new", "New.")]),
        ):
            with pytest.raises(StorageFullError):
                await call
        assert (await rows(database), await hits(banks, "atlas", k=100)) == before
        assert await found(banks, "atlas", "Oslo", k=1) == ["oslo"]


async def test_a_search_that_is_cut_off_does_no_harm(database: Database) -> None:
    """Clients leave at any moment, also while an index is being loaded."""
    async with serve_sqlite(HASHING, database) as banks:
        await banks.create("many", "Many", [document(f"d{n}", f"Number {n} of many.") for n in range(3000)])
    async with serve_sqlite(HASHING, database) as banks:
        for pause in range(12):
            query = asyncio.create_task(banks.query(QueryRequest(bank_uuid="many", text="Number 7", k=1000)))
            await asyncio.sleep(pause / 1000)
            query.cancel()
            await asyncio.wait([query])
        assert len(await hits(banks, "many", "number", mode=QueryMode.VECTOR, k=1000)) == 1000
        assert await found(banks, "many", "2999", k=1) == ["d2999"]


class OtherEmbedder(HashingEmbedder):
    """Hashing under another name and with other dimensions."""

    name = "other"
    dimensions = 32


async def test_a_bank_keeps_the_model_that_it_was_made_with(database: Database) -> None:
    """Vectors of two models in one bank would find anything; what needs no model works without it."""
    async with serve_sqlite(HASHING, database) as banks:
        await banks.create("atlas", "Atlas", list(ATLAS))
        with pytest.raises(ModelNotFoundError):
            await banks.create("new", "New", [], embedding_model="unheard-of")
    changed = DatabaseBanks(database, SqliteChunks(database), Extractor(HASHING.documents), [OtherEmbedder()], HASHING)
    for call in (
        changed.insert("atlas", [document("a", "A")]),
        changed.update("atlas", [document("oslo", "A")]),
        changed.query(QueryRequest(bank_uuid="atlas", text="a")),
        changed.preview("atlas", []),
    ):
        with pytest.raises(ConflictError, match="'feature-hashing' of 512 dimensions.* other \\(32 dimensions\\)"):
            await call
    assert len(await contents(changed, "atlas", "oslo", "rome")) == 2
    assert await all_of(await changed.delete_documents("atlas", ["rome"])) == ["rome"]
    both = DatabaseBanks(
        database, SqliteChunks(database), Extractor(HASHING.documents), [OtherEmbedder(), HashingEmbedder()], HASHING
    )
    await both.create("small", "Small", list(ATLAS), embedding_model="other")
    assert await found(both, "small", "Oslo", k=1) == await found(both, "atlas", "Oslo", k=1) == ["oslo"]


async def test_sizes_of_chunks_that_do_not_fit_are_refused(database: Database) -> None:
    """A chunk longer than the model reads would be cut in silence; one that is mostly overlap never ends."""
    async with serve_sqlite(HASHING, database) as banks:
        with pytest.raises(InvalidRequestError) as refused:
            await banks.create("a", "A", [], chunk_tokens=20, chunk_overlap=11)
        assert refused.value.faults[0].pointer == "?chunk_overlap"


async def test_the_store_must_be_sqlite(postgresql_schema_url: str, tmp_path: Path) -> None:
    """Vectors in the memory of one process are no index of a database that several share."""
    async with open_store(postgresql_schema_url, tmp_path) as store:
        serving = serve_sqlite(HASHING, store.database("memory_banks.sqlite"))
        with pytest.raises(SetupError, match="storage.url is postgresql"):
            await serving.__aenter__()


async def test_all_seven_operations_are_the_drafts(tmp_path: Path) -> None:
    """A client that was generated from the draft reads every reply, over HTTP and with the draft's own schemas."""
    draft = DraftSchemas()
    providers = {"memory_banks": [{"provider": "sqlite", "config": {"embedder": "builtin:hashing"}}]}
    distribution = Distribution.model_validate(
        {"version": 1, "name": "t", "providers": providers, "server": {"port": 0, "drain_seconds": 1}}
    )
    stack = Stack(distribution, Registry(discover()), state_folder=tmp_path)
    stored = [
        {"uuid": uuid, "content": b64encode(text).decode(), "metadata": {"n": 1}, "mime_type": "text/plain"}
        for uuid, text in (("oslo", b"Oslo \xc3\xa6"), ("rome", b"Rome"))
    ]
    changed = [stored[0] | {"metadata": {}}]
    calls: list[tuple[str, str, dict[str, str], Any, list[Any]]] = [
        ("POST", "/memory_banks/create", {"bank_uuid": "b", "bank_name": "B"}, stored[:1], []),
        ("GET", "/memory_banks/get", {}, None, [{"uuid": "b", "name": "B"}]),
        ("POST", "/memory_bank/insert", {"bank_uuid": "b"}, stored[1:], []),
        ("POST", "/memory_bank/update", {"bank_uuid": "b"}, changed, []),
        ("POST", "/memory_bank/get", {"bank_uuid": "b"}, ["rome", "none", "oslo"], [stored[1], changed[0]]),
        ("POST", "/memory_bank/delete", {"bank_uuid": "b"}, ["none", "rome"], ["rome"]),
        ("DELETE", "/memory_banks/drop", {"bank_uuid": "b"}, None, ["b"]),
    ]
    async with running(stack), listening(stack) as server, httpx2.AsyncClient(trust_env=False) as client:
        client.base_url = httpx2.URL(server.url)
        notice = (await client.get("/health/ready")).json()["providers"][0]["details"]["notice"]
        assert "feature hashing" in notice
        for method, path, query, body, expected in calls:
            if body is not None:
                draft.check_request(f"{method} {path}", body)
            reply = await client.request(method, path, params=query, json=body)
            assert reply.status_code == 200, reply.text
            values = [json.loads(line) for line in reply.text.splitlines()]
            assert values == expected
            for value in values:
                draft.check_reply(f"{method} {path}", value)
