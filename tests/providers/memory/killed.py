"""Writes to memory banks until it is killed: ``killed.py FOLDER URL``, a writer for each line of input, its seed.

A writer says each operation before it sends it, as JSON, and then that it is done.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread  # noqa: F401  this and what follows: once, not in each fork
from llama_stack_memory import MemoryConfig
from llama_stack_memory.provider import serve_pgvector, serve_sqlite
from sqlalchemy.dialects.sqlite import aiosqlite  # noqa: F401

import llama_stack.storage.sqlite  # noqa: F401
from llama_stack.apis import MemoryBanks
from llama_stack.apis.memory_banks import IndexKind, MemoryBankDocument
from llama_stack.storage import Database, open_store
from llama_stack.testing.memory_banks import all_of, document, found

OWNER = "memory_banks.killed"
BANKS = ("red", "green", "blue")
IDS = [f"d{n}" for n in range(12)]


@asynccontextmanager
async def opened(folder: Path, url: str) -> AsyncIterator[tuple[MemoryBanks, Database]]:
    """The banks of a store, and its tables."""
    async with open_store(url, folder) as store:
        database = store.database(OWNER)
        # A graph of pgvector's is part of what is written; one of faiss's is made when it is searched.
        serve, index = (serve_sqlite, "exact") if url == "sqlite" else (serve_pgvector, "hnsw")
        config = MemoryConfig(embedder="builtin:hashing", chunk_tokens=16, chunk_overlap=4, index=IndexKind(index))
        async with serve(config, database) as banks:
            yield banks, database


def say(line: str) -> None:
    # One write call, so that a killed child leaves no half line.
    os.write(1, f"{line}\n".encode())


def text_of(uuid: str, version: int) -> str:
    """Three chunks or so, each of which tells which document and version it is of."""
    return f"Document {uuid} in version v{version} says this. " * 5


def made(uuid: str, version: int) -> MemoryBankDocument:
    """A document of that version, which its metadata tell too."""
    return document(uuid, text_of(uuid, version), {"version": version, "of": uuid})


async def choose(banks: MemoryBanks, chance: random.Random, version: int) -> dict[str, Any]:
    """An operation that will succeed."""
    there = [bank.uuid for bank in await all_of(await banks.list_banks())]
    absent = [bank for bank in BANKS if bank not in there]
    if absent and (not there or chance.random() < 0.3):
        return {"op": "create", "bank": chance.choice(absent), "ids": chance.sample(IDS, 4), "version": version}
    bank = chance.choice(there)
    if chance.random() < 0.1:
        return {"op": "drop", "bank": bank}
    held = await found(banks, bank, k=1000)
    free = [uuid for uuid in IDS if uuid not in held]
    kinds = {"insert": free, "update": held, "delete": held}
    kind = chance.choice([kind for kind, ids in kinds.items() if ids])
    ids = chance.sample(kinds[kind], chance.randint(1, len(kinds[kind])))
    return {"op": kind, "bank": bank, "ids": ids, "version": version}


async def send(banks: MemoryBanks, operation: dict[str, Any]) -> None:
    bank = operation["bank"]
    documents = [made(uuid, operation.get("version", 0)) for uuid in operation.get("ids", [])]
    match operation["op"]:
        case "create":
            await banks.create(bank, bank, documents)
        case "drop":
            await banks.drop(bank)
        case "insert":
            await banks.insert(bank, documents)
        case "update":
            await banks.update(bank, documents)
        case "delete":
            await all_of(await banks.delete_documents(bank, operation["ids"]))


async def write(folder: Path, url: str, seed: int) -> None:
    chance = random.Random(seed)
    async with opened(folder, url) as (banks, _):
        version = seed * 100_000
        while True:
            version += 1
            operation = await choose(banks, chance, version)
            say(json.dumps(operation))
            await send(banks, operation)
            say("done")


def main(folder: Path, url: str) -> None:
    for line in sys.stdin:
        writer = os.fork()
        if writer == 0:
            asyncio.run(write(folder, url, int(line)))
        say(f"started {writer}")
        os.waitpid(writer, 0)
        say("ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
