"""The store in PostgreSQL keeps the contract, on a real server."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from llama_stack_memory import MemoryConfig, pgvector_chunks
from llama_stack_memory.banks import read_bank
from llama_stack_memory.provider import serve_pgvector, serve_sqlite
from llama_stack_memory.tables import POSTGRESQL_MIGRATIONS
from sqlalchemy import text

from llama_stack.apis import MemoryBanks
from llama_stack.apis.memory_banks import IndexKind, QueryMode
from llama_stack.errors import InvalidRequestError, SetupError, TooLargeError
from llama_stack.storage import Store, open_store
from llama_stack.testing.memory_banks import ATLAS, MemoryBanksConformance, all_of, document, found, hits

pytestmark = pytest.mark.anyio

HASHING = MemoryConfig(embedder="builtin:hashing")
GRAPH = MemoryConfig(embedder="builtin:hashing", index=IndexKind.HNSW)
OWNER = "memory_banks.pgvector"


class TestPgvector(MemoryBanksConformance):
    """Everything that any provider must keep to."""

    config = HASHING

    @pytest.fixture(autouse=True)
    def _database(self, postgresql_url: str) -> None:
        self._url = postgresql_url

    @asynccontextmanager
    async def open(self, folder: Path) -> AsyncIterator[MemoryBanks]:
        async with (
            open_store(self._url, folder) as store,
            serve_pgvector(self.config, store.database(OWNER)) as banks,
        ):
            yield banks


class TestPgvectorWithGraph(TestPgvector):
    """The same with banks that are searched by a graph, from a few rows on."""

    config = GRAPH
    is_exact = False

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pgvector_chunks, "SMALL_ROWS", 8)


async def plan_of(store: Store, sql: str, values: dict[str, object]) -> str:
    """How the server runs a statement while it walks."""
    database = store.database(OWNER)
    async with database.read() as connection:
        await connection.execute(text(pgvector_chunks._WALKING), {"width": "100"})
        rows = await connection.execute(text(f"EXPLAIN {database.expand(sql)}"), values)
        return "\n".join(rows.scalars())


async def indexes(store: Store) -> set[str]:
    """The graphs that there are."""
    async with store.database(OWNER).read() as connection:
        rows = await connection.execute(text("SELECT indexname FROM pg_indexes WHERE indexdef LIKE '% USING hnsw %'"))
        return set(rows.scalars())


async def test_a_graph_serves_its_bank_and_goes_with_it(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement of a search is one that the server answers by the bank's own index; others need none."""
    monkeypatch.setattr(pgvector_chunks, "SMALL_ROWS", 8)
    async with open_store(postgresql_url, tmp_path) as store, serve_pgvector(HASHING, store.database(OWNER)) as banks:
        documents = [document(f"d{n}", f"Number {n} of a hundred.", {"n": n}) for n in range(100)]
        for uuid in ("one", "other"):
            await banks.create(uuid, uuid, documents, index=IndexKind.HNSW)
        await banks.create("exact", "Exact", documents)
        assert len(await indexes(store)) == 2
        async with store.database(OWNER).read() as connection:
            bank = await read_bank(connection, store.database(OWNER), "one")
        vector = f"[{','.join(['0.1'] * bank.dimensions)}]"
        plan = await plan_of(store, pgvector_chunks.walk_sql(bank), {"k": 5, "near": 10, "vector": vector})
        assert f"Index Scan using {store.database(OWNER).name(f'graph_{bank.id}')}" in plan
        for k, more in ((100, {}), (5, {"filter": {"ge": ["n", 0]}})):  # no walk finds all, and none keeps to a filter
            expected, got = [
                await hits(banks, uuid, "number 7 hundred", mode=QueryMode.VECTOR, k=k, **more)
                for uuid in ("exact", "one")
            ]
            assert [(hit.document_uuid, hit.score) for hit in got] == [(h.document_uuid, h.score) for h in expected]
        assert await found(banks, "one", "number 7 hundred", mode=QueryMode.VECTOR, k=1) == ["d7"]
        await all_of(await banks.delete_documents("one", [f"d{n}" for n in range(1, 100)]))
        assert await found(banks, "one", "number", mode=QueryMode.VECTOR, k=100) == ["d0"]
        await banks.drop("one")
        await banks.drop("exact")
        assert len(await indexes(store)) == 1


async def test_a_graph_that_cannot_be_is_refused(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors that are too long for it, and a server whose pgvector is too old; nothing is left of the request."""
    async with open_store(postgresql_url, tmp_path) as store:
        database = store.database(OWNER)
        monkeypatch.setattr(pgvector_chunks, "MAX_GRAPH_DIMENSIONS", 100)
        async with serve_pgvector(HASHING, database) as banks:
            with pytest.raises(InvalidRequestError, match="512 dimensions"):
                await banks.create("b", "B", list(ATLAS), index=IndexKind.HNSW)
            await banks.create("b", "B", list(ATLAS))
        monkeypatch.setattr(pgvector_chunks, "GRAPHS_SINCE", (99, 0))
        with pytest.raises(SetupError, match="pgvector is too old"):
            await serve_pgvector(GRAPH, database).__aenter__()
        async with serve_pgvector(HASHING, database) as banks:
            with pytest.raises(InvalidRequestError, match="there is no hnsw here; there is: exact"):
                await banks.create("new", "New", [], index=IndexKind.HNSW)


async def test_it_finds_what_the_embedded_store_finds(postgresql_url: str, tmp_path: Path) -> None:
    """The same vectors and the same BM25: whoever outgrows one file gets the same answers in the same order."""
    line = (
        "snow rain wind sea ship sail harbour north south winter summer light dark the of and it was running quickly"
        " cities storms sailing lighthouse-keeper 3.11 user_name \u00e9t\u00e9"
    )
    words = line.split()
    count = len(words)
    texts = [" ".join(words[(n * k) % count] for k in range(1, 5 + n % 17)) + f" {n}" for n in range(60)]
    documents = [document(f"d{n}", text) for n, text in enumerate(texts)]
    async with (
        open_store("sqlite", tmp_path / "one") as one_store,
        open_store(postgresql_url, tmp_path / "other") as other_store,
        serve_sqlite(HASHING, one_store.database("memory_banks.sqlite")) as one,
        serve_pgvector(HASHING, other_store.database(OWNER)) as other,
    ):
        for banks in (one, other):
            await banks.create("b", "B", documents)
        for query in (
            *("snow", "winter ship 7", "dark sea in the north", "lighthouses", "sailing ships sail", "user name 3.11"),
            *("Ete", "the and of it", "it was quick to run to the city in a storm", "keepers of lighthouses"),
        ):
            for mode in QueryMode:
                expected = await hits(one, "b", query, mode=mode, k=60)
                got = await hits(other, "b", query, mode=mode, k=60)
                scores = {hit.document_uuid: pytest.approx(hit.score, rel=1e-3, abs=1e-5) for hit in expected}
                if mode is not QueryMode.HYBRID:  # whose ranks tell apart what scores the same but for rounding
                    assert {hit.document_uuid: hit.score for hit in got} == scores, (query, mode)


async def test_chunks_of_before_are_found_by_every_word(postgresql_url: str, tmp_path: Path) -> None:
    """A store whose words a parser had chosen is brought up to date when it is opened."""
    async with open_store(postgresql_url, tmp_path) as store:
        database = store.database(OWNER)
        await database.migrate(POSTGRESQL_MIGRATIONS[:1])
        async with database.write() as connection:
            await connection.exec_driver_sql(
                database.expand(
                    "INSERT INTO {chunks} SELECT n, 1, t, to_tsvector('english', t), 1, '[1,2]'"
                    " FROM (SELECT n, 'See example.com ' || n AS t FROM generate_series(1, 2500) n) x"
                )
            )
        await database.migrate(POSTGRESQL_MIGRATIONS)
        async with database.read() as connection:
            sql = "SELECT count(*), min(size), max(size) FROM {chunks} WHERE words @@ 'exampl & com'::tsquery"
            assert tuple((await connection.exec_driver_sql(database.expand(sql))).one()) == (2500, 4, 4)


async def test_a_chunk_with_too_many_words_is_refused(postgresql_url: str, tmp_path: Path) -> None:
    """The server indexes a megabyte of them at most, which takes letters of four bytes and chunks of 8192 tokens."""
    letters = [chr(0x1D400 + n) for n in range(52)]
    chance = random.Random(1)
    text = " ".join("".join(chance.choices(letters, k=32)) for _ in range(8300))
    async with open_store(postgresql_url, tmp_path) as store, serve_pgvector(HASHING, store.database(OWNER)) as banks:
        await banks.create("b", "B", [], chunk_tokens=8192, chunk_overlap=0)
        with pytest.raises(TooLargeError, match="smaller chunks"):
            await banks.insert("b", [document("small", "Fine."), document("huge", text)])
        assert await found(banks, "b", k=9) == []


async def test_processes_see_each_others_writes(postgresql_url: str, tmp_path: Path) -> None:
    """Several machines on one database are what it is for."""
    async with (
        open_store(postgresql_url, tmp_path / "one") as one_store,
        open_store(postgresql_url, tmp_path / "other") as other_store,
        serve_pgvector(HASHING, one_store.database(OWNER)) as one,
        serve_pgvector(HASHING, other_store.database(OWNER)) as other,
    ):
        await one.create("atlas", "Atlas", list(ATLAS))
        await other.update("atlas", [document("oslo", "A fjord.")])
        assert await found(one, "atlas", "fjord", k=1) == ["oslo"]


async def test_the_store_must_be_postgresql(tmp_path: Path) -> None:
    """The error names the provider that fits."""
    async with open_store("sqlite", tmp_path) as store:
        with pytest.raises(SetupError, match="use 'sqlite'"):
            await serve_pgvector(HASHING, store.database(OWNER)).__aenter__()
