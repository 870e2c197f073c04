"""Declares the providers of this plugin; numpy is imported when a distribution names one of them, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib import import_module

from llama_stack.apis import Inference, MemoryBanks
from llama_stack.plugins import ProviderSpec, hookimpl
from llama_stack.storage import Database

from .config import EmbeddingsConfig, MemoryConfig

llama_stack_api_version = ">=1.0,<2"


@asynccontextmanager
async def start_sqlite(config: MemoryConfig, database: Database) -> AsyncIterator[MemoryBanks]:
    """Bring the tables up to date and yield the banks; indexes are loaded meanwhile, and a search waits for its own.

    Raises ``SetupError`` when the stack's store is not SQLite, ``CheckpointError`` for an embedder that is none.
    """
    provider = await asyncio.to_thread(import_module, ".provider", __package__)
    async with provider.serve_sqlite(config, database) as banks:
        yield banks


@asynccontextmanager
async def start_pgvector(config: MemoryConfig, database: Database) -> AsyncIterator[MemoryBanks]:
    """Bring the tables up to date and yield the banks.

    Raises ``SetupError`` when the stack's store is not PostgreSQL, ``MigrationFailedError`` when the server has no
    pgvector, ``CheckpointError`` for an embedder that is none.
    """
    provider = await asyncio.to_thread(import_module, ".provider", __package__)
    async with provider.serve_pgvector(config, database) as banks:
        yield banks


@asynccontextmanager
async def start_embeddings(config: EmbeddingsConfig) -> AsyncIterator[Inference]:
    """Load the model and yield the provider that serves it.

    Raises ``CheckpointError`` for a folder that holds none.
    """
    provider = await asyncio.to_thread(import_module, ".embeddings", __package__)
    yield await asyncio.to_thread(provider.load, config)


@hookimpl
def llama_stack_providers() -> Iterable[ProviderSpec]:
    """Declare memory banks in SQLite and in PostgreSQL, and embeddings alone."""
    yield ProviderSpec(
        api=Inference,
        name="embeddings",
        config=EmbeddingsConfig,
        start=start_embeddings,
        description="texts to vectors by a sentence model of the BERT family, on the CPU",
    )
    yield ProviderSpec(
        api=MemoryBanks,
        name="sqlite",
        config=MemoryConfig,
        start=start_sqlite,
        description="documents, vectors and full text in the stack's SQLite file: vector, keyword and hybrid search",
    )
    yield ProviderSpec(
        api=MemoryBanks,
        name="pgvector",
        config=MemoryConfig,
        start=start_pgvector,
        description="the same in the stack's PostgreSQL database, by pgvector: for several machines on one state",
    )
