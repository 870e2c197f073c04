"""Opens the banks of one distribution: embedders, tables, and the index that is loaded behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llama_stack.errors import SetupError
from llama_stack.storage import Database

from .banks import Chunks, DatabaseBanks
from .config import MemoryConfig
from .embedders import HashingEmbedder, choose_embedder
from .extraction import Extractor
from .interfaces import Embedder
from .pgvector_chunks import PgvectorChunks
from .sqlite_chunks import SqliteChunks
from .tables import POSTGRESQL_MIGRATIONS, SQLITE_MIGRATIONS


@asynccontextmanager
async def serve_sqlite(config: MemoryConfig, database: Database) -> AsyncIterator[DatabaseBanks]:
    """See ``plugin.start_sqlite``."""
    if database.dialect != "sqlite":
        raise SetupError(
            f"provider 'sqlite' keeps banks in SQLite, and storage.url is {database.dialect}: use 'pgvector'"
        )
    await database.migrate(SQLITE_MIGRATIONS)
    chunks = SqliteChunks(database)
    loading = asyncio.create_task(chunks.load(), name="load the indexes of memory banks")
    try:
        async with _serve(config, database, chunks) as banks:
            yield banks
    finally:
        loading.cancel()
        await asyncio.wait([loading])


@asynccontextmanager
async def serve_pgvector(config: MemoryConfig, database: Database) -> AsyncIterator[DatabaseBanks]:
    """See ``plugin.start_pgvector``."""
    if database.dialect != "postgresql":
        raise SetupError("provider 'pgvector' keeps banks in PostgreSQL, and storage.url is sqlite: use 'sqlite'")
    await database.migrate(POSTGRESQL_MIGRATIONS)
    async with _serve(config, database, await PgvectorChunks.on(database)) as banks:
        yield banks


@asynccontextmanager
async def _serve(config: MemoryConfig, database: Database, chunks: Chunks) -> AsyncIterator[DatabaseBanks]:
    if config.index not in chunks.kinds:
        remedy = "install faiss-cpu" if database.dialect == "sqlite" else "the server's pgvector is too old"
        raise SetupError(f"index: there is no {config.index.value} here; {remedy}")
    chosen = await asyncio.to_thread(choose_embedder, config.embedder)
    if config.chunk_tokens > chosen.embedder.max_tokens:
        raise SetupError(
            f"chunk_tokens: {chosen.embedder.name} reads {chosen.embedder.max_tokens} tokens, and {config.chunk_tokens}"
            " are asked for; set no more than that"
        )
    # Banks that were made before a model was there go on: hashing needs nothing.
    embedders: dict[str, Embedder] = {e.name: e for e in (chosen.embedder, HashingEmbedder())}
    async with Extractor.started(config.documents) as extractor:
        yield DatabaseBanks(database, chunks, extractor, list(embedders.values()), config, chosen.notice)
