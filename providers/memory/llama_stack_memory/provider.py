"""Opens the banks of one distribution: embedders, tables, and the index that is loaded behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llama_stack.errors import SetupError
from llama_stack.storage import Database

from .banks import DatabaseBanks
from .config import MemoryConfig
from .hashing import HashingEmbedder
from .sqlite_chunks import SqliteChunks
from .tables import SQLITE_MIGRATIONS

HASHING_NOTICE = "texts are embedded by feature hashing, which knows words and not what they mean"


@asynccontextmanager
async def serve_sqlite(config: MemoryConfig, database: Database) -> AsyncIterator[DatabaseBanks]:
    """See ``plugin.start_sqlite``."""
    if database.dialect != "sqlite":
        raise SetupError(f"provider 'sqlite' keeps banks in SQLite, and storage.url is {database.dialect}")
    await database.migrate(SQLITE_MIGRATIONS)
    chunks = SqliteChunks(database)
    loading = asyncio.create_task(chunks.load(), name="load the indexes of memory banks")
    try:
        yield DatabaseBanks(database, chunks, [HashingEmbedder()], config, HASHING_NOTICE)
    finally:
        loading.cancel()
        await asyncio.wait([loading])
