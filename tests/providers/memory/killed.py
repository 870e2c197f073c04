"""Writes to memory banks until it is killed: ``killed.py FOLDER``, a writer for each line of input, which is its seed.

A writer says each operation before it sends it, as JSON, and then that it is done.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import anyio.to_thread  # noqa: F401  this and what follows: once, not in each fork
from llama_stack_memory import MemoryConfig
from llama_stack_memory.provider import serve_sqlite
from sqlalchemy.dialects.sqlite import aiosqlite  # noqa: F401

import llama_stack.storage.sqlite  # noqa: F401
from llama_stack.apis import MemoryBanks
from llama_stack.storage import open_store
from llama_stack.testing.memory_banks import all_of, document, found

OWNER = "memory_banks.sqlite"
CONFIG = MemoryConfig(embedder="builtin:hashing", chunk_tokens=16, chunk_overlap=4)
BANKS = ("red", "green", "blue")
IDS = [f"d{n}" for n in range(12)]


def say(line: str) -> None:
    # One write call, so that a killed child leaves no half line.
    os.write(1, f"{line}\n".encode())


def text_of(uuid: str, version: int) -> str:
    """Three chunks or so, each of which tells which document and version it is of."""
    return f"Document {uuid} in version v{version} says this. " * 5


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
    documents = [document(uuid, text_of(uuid, operation.get("version", 0))) for uuid in operation.get("ids", [])]
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


async def write(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with open_store("sqlite", folder) as store, serve_sqlite(CONFIG, store.database(OWNER)) as banks:
        version = seed * 100_000
        while True:
            version += 1
            operation = await choose(banks, chance, version)
            say(json.dumps(operation))
            await send(banks, operation)
            say("done")


def main(folder: Path) -> None:
    for line in sys.stdin:
        writer = os.fork()
        if writer == 0:
            asyncio.run(write(folder, int(line)))
        say(f"started {writer}")
        os.waitpid(writer, 0)
        say("ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
