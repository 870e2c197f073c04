"""What was answered survives kill -9, and what was not is there whole or not at all."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_stack_memory.provider import serve_sqlite

from llama_stack.apis import MemoryBanks
from llama_stack.apis.memory_banks import QueryMode
from llama_stack.storage import Database, open_store
from llama_stack.testing.memory_banks import all_of, contents, hits
from tests.providers.memory.killed import CONFIG, IDS, OWNER, text_of

pytestmark = pytest.mark.anyio

KILLS = int(os.environ.get("LLAMA_STACK_KILLS", "12"))
"""300 and more when asked for; a dozen show a mistake in the order of things."""

State = dict[str, dict[str, int]]
"""The version of each document of each bank."""


def after(state: State, operation: dict[str, Any]) -> State:
    """What an operation leaves."""
    new = copy.deepcopy(state)
    bank, ids = operation["bank"], operation.get("ids", [])
    match operation["op"]:
        case "drop":
            del new[bank]
        case "delete":
            new[bank] = {uuid: version for uuid, version in new[bank].items() if uuid not in ids}
        case _:
            new[bank] = new.get(bank, {}) | dict.fromkeys(ids, operation["version"])
    return new


async def state_of(banks: MemoryBanks) -> State:
    """What the banks hold, and that every way to look shows the same."""
    state: State = {}
    for bank in [bank.uuid for bank in await all_of(await banks.list_banks())]:
        held = {uuid: content.decode() for uuid, content in (await contents(banks, bank, *IDS)).items()}
        state[bank] = {uuid: int(text.partition("version v")[2].partition(" ")[0]) for uuid, text in held.items()}
        assert held == {uuid: text_of(uuid, version) for uuid, version in state[bank].items()}
        chunks = {(hit.document_uuid, hit.text) for hit in await hits(banks, bank, k=1000)}
        assert {uuid for uuid, _ in chunks} == held.keys()
        assert all(text in held[uuid] for uuid, text in chunks)
        for mode in (QueryMode.VECTOR, QueryMode.KEYWORD):
            by_search = await hits(banks, bank, "document version says", mode=mode, k=1000)
            assert {(hit.document_uuid, hit.text) for hit in by_search} == chunks
    return state


async def no_orphans(database: Database) -> None:
    """Rows of the parts of documents are rows of documents."""
    async with database.read() as connection:
        for part, key in (("chunks", "id >> 20"), ("texts", "rowid >> 20"), ("attributes", "document")):
            lost = f"SELECT count(*) FROM {{{part}}} WHERE {key} NOT IN (SELECT id FROM {{documents}})"
            assert await connection.scalar(database.sql(lost)) == 0
        lost = "SELECT count(*) FROM {documents} WHERE bank NOT IN (SELECT id FROM {banks})"
        assert await connection.scalar(database.sql(lost)) == 0
        assert await connection.scalar(database.sql("SELECT count(*) FROM {chunks}")) == await connection.scalar(
            database.sql("SELECT count(*) FROM {texts}")
        )


async def test_what_was_answered_survives_kill_9(tmp_path: Path) -> None:
    """Kills at random moments within random operations; each is followed by a look at everything."""
    chance = random.Random(7)
    command = [sys.executable, "-m", "tests.providers.memory.killed", str(tmp_path)]
    writers = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert writers.stdin is not None
    assert writers.stdout is not None
    expected: State = {}
    answered = 0
    for seed in range(KILLS):
        writers.stdin.write(f"{seed}\n")
        writers.stdin.flush()
        writer = int(writers.stdout.readline().removeprefix("started "))
        wanted = answered + chance.randrange(1, 10)
        pending: dict[str, Any] | None = None
        while line := writers.stdout.readline().strip():
            if line == "ended":
                break
            if line == "done":
                assert pending is not None
                expected, pending = after(expected, pending), None
                answered += 1
            else:
                pending = json.loads(line)
                if answered >= wanted:
                    await asyncio.sleep(chance.random() / 60)  # somewhere within the operation: the moment is the point
                    os.kill(writer, signal.SIGKILL)
                    wanted = 10**9
        async with open_store("sqlite", tmp_path) as store:
            database = store.database(OWNER)
            async with serve_sqlite(CONFIG, database) as banks:
                found = await state_of(banks)
                await no_orphans(database)
        assert found in (expected, None if pending is None else after(expected, pending)), seed
        expected = found
    writers.stdin.close()
    writers.stdout.close()
    writers.wait()
    assert answered >= KILLS
