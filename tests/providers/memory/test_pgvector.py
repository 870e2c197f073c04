"""The store in PostgreSQL keeps the contract, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from llama_stack_memory import MemoryConfig
from llama_stack_memory.provider import serve_pgvector, serve_sqlite

from llama_stack.apis import MemoryBanks
from llama_stack.apis.memory_banks import QueryMode
from llama_stack.errors import SetupError
from llama_stack.storage import open_store
from llama_stack.testing.memory_banks import ATLAS, MemoryBanksConformance, document, found, hits

pytestmark = pytest.mark.anyio

HASHING = MemoryConfig(embedder="builtin:hashing")
OWNER = "memory_banks.pgvector"


class TestPgvector(MemoryBanksConformance):
    """Everything that any provider must keep to."""

    @pytest.fixture(autouse=True)
    def _database(self, postgresql_url: str) -> None:
        self._url = postgresql_url

    @asynccontextmanager
    async def open(self, folder: Path) -> AsyncIterator[MemoryBanks]:
        async with (
            open_store(self._url, folder) as store,
            serve_pgvector(HASHING, store.database(OWNER)) as banks,
        ):
            yield banks


async def test_it_finds_what_the_embedded_store_finds(postgresql_url: str, tmp_path: Path) -> None:
    """The same vectors and the same BM25: whoever outgrows one file gets the same answers in the same order."""
    words = [
        "snow",
        "rain",
        "wind",
        "sea",
        "ship",
        "sail",
        "harbour",
        "north",
        "south",
        "winter",
        "summer",
        "light",
        "dark",
    ]
    texts = [" ".join(words[(n * k) % 13] for k in range(1, 9)) + f" {n}" for n in range(40)]
    documents = [document(f"d{n}", text) for n, text in enumerate(texts)]
    async with (
        open_store("sqlite", tmp_path / "one") as one_store,
        open_store(postgresql_url, tmp_path / "other") as other_store,
        serve_sqlite(HASHING, one_store.database("memory_banks.sqlite")) as one,
        serve_pgvector(HASHING, other_store.database(OWNER)) as other,
    ):
        for banks in (one, other):
            await banks.create("b", "B", documents)
        for query in ("snow", "winter ship 7", "dark sea in the north", "lighthouses"):
            for mode in QueryMode:
                expected = await hits(one, "b", query, mode=mode, k=40)
                got = await hits(other, "b", query, mode=mode, k=40)
                scores = {hit.document_uuid: pytest.approx(hit.score, rel=1e-3, abs=1e-5) for hit in expected}
                if mode is not QueryMode.HYBRID:  # whose ranks tell apart what scores the same but for rounding
                    assert {hit.document_uuid: hit.score for hit in got} == scores


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
