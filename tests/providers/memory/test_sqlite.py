"""The embedded store keeps the contract, and what is its own: an index in memory that follows the table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from llama_stack_memory import MemoryConfig
from llama_stack_memory.banks import DatabaseBanks
from llama_stack_memory.embedders import Chosen, HashingEmbedder
from llama_stack_memory.extraction import Extractor
from llama_stack_memory.interfaces import Span, Vectors
from llama_stack_memory.provider import serve_sqlite
from llama_stack_memory.sqlite_chunks import SqliteChunks
from llama_stack_memory.tables import SQLITE_MIGRATIONS
from llama_stack_memory.vectors import has_faiss, hnsw

from llama_stack.apis import MemoryBanks
from llama_stack.apis.memory_banks import IndexKind, QueryMode, QueryRequest
from llama_stack.errors import (
    ConflictError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    SetupError,
    StorageFullError,
)
from llama_stack.storage import Database, open_store
from llama_stack.testing.memory_banks import ATLAS, MemoryBanksConformance, all_of, contents, document, found, hits

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


async def test_a_bank_that_another_process_dropped_leaves_no_index(tmp_path: Path) -> None:
    """Its vectors would stay in the memory of this process for good."""
    async with open_store("sqlite", tmp_path) as one_store, open_store("sqlite", tmp_path) as other_store:
        name = "memory_banks.sqlite"
        chunks = SqliteChunks(one_store.database(name))
        async with serve_sqlite(HASHING, other_store.database(name)) as other:
            one = DatabaseBanks(
                one_store.database(name), chunks, Extractor(HASHING.documents), [HashingEmbedder()], HASHING
            )
            await one.create("atlas", "Atlas", list(ATLAS))
            assert await found(one, "atlas", "Oslo", k=1) == ["oslo"]
            await other.drop("atlas")
            with pytest.raises(NotFoundError):
                await found(one, "atlas", "Oslo")
            assert chunks._indexes == {}


async def test_a_bank_that_another_process_made_anew_has_its_new_model(tmp_path: Path) -> None:
    """A query is judged by the bank as it is, not by the one of that name that this process knew."""
    async with open_store("sqlite", tmp_path) as one_store, open_store("sqlite", tmp_path) as other_store:
        one, other = (
            DatabaseBanks(
                store.database("memory_banks.sqlite"),
                SqliteChunks(store.database("memory_banks.sqlite")),
                Extractor(HASHING.documents),
                [HashingEmbedder(), OtherEmbedder()],
                HASHING,
            )
            for store in (one_store, other_store)
        )
        await one_store.database("memory_banks.sqlite").migrate(SQLITE_MIGRATIONS)
        await one.create("atlas", "Atlas", list(ATLAS))
        assert await found(one, "atlas", "Oslo", k=1) == ["oslo"]
        await other.drop("atlas")
        await other.create("atlas", "Atlas", list(ATLAS), embedding_model="other")
        vector = OtherEmbedder().embed(["Oslo is the capital of Norway."])[0].tolist()
        assert await found(one, "atlas", embedding=vector, k=1) == ["oslo"]


async def test_documents_of_a_bank_that_is_made_anew_are_not_mixed_with_its_old_ones(database: Database) -> None:
    """A reply that is read slowly is of the bank that was asked."""
    async with serve_sqlite(HASHING, database) as banks:
        await banks.create("atlas", "Atlas", list(ATLAS))
        reply = await banks.get_documents("atlas", ["oslo", "rome"])
        assert (await anext(reply)).uuid == "oslo"
        await banks.drop("atlas")
        await banks.create("atlas", "Atlas", [document("rome", "Another Rome.")])
        assert await all_of(reply) == []


async def test_embedding_and_reading_leave_the_event_loop_free(database: Database) -> None:
    """Streams of tokens go on while a large insert is prepared: each call of the model waits until they did."""
    loop = asyncio.get_running_loop()

    class Waiting(HashingEmbedder):
        """Computes only when the event loop has turned meanwhile."""

        def embed(self, texts: Sequence[str]) -> Vectors:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(timeout=30)
            return super().embed(texts)

        def token_spans(self, text: str) -> list[Span]:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(timeout=30)
            return super().token_spans(text)

    await database.migrate(SQLITE_MIGRATIONS)
    async with Extractor.started(HASHING.documents) as extractor:
        banks = DatabaseBanks(database, SqliteChunks(database), extractor, [Waiting()], HASHING)
        await banks.create("many", "Many", [document(f"d{n}", f"Number {n}.") for n in range(100)])
        assert await found(banks, "many", "number 7", k=1) == ["d7"]


async def test_settings_that_the_model_cannot_keep_stop_the_start(database: Database) -> None:
    """Otherwise each bank that is created without sizes of its own would be refused, one request at a time."""

    class Short(HashingEmbedder):
        max_tokens = 100

    chosen = Chosen(Short())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_stack_memory.provider.choose_embedder", lambda setting: chosen)
        with pytest.raises(SetupError, match="chunk_tokens: feature-hashing reads 100 tokens, and 200 are asked for"):
            await serve_sqlite(HASHING, database).__aenter__()


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
