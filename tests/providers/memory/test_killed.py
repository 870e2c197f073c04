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
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_stack_memory.embedders import HashingEmbedder

from llama_stack.apis import MemoryBanks
from llama_stack.apis.memory_banks import QueryMode
from llama_stack.storage import Database
from llama_stack.testing.memory_banks import all_of, contents, hits
from tests.providers.memory.killed import IDS, opened, text_of

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
        for uuid, version in state[bank].items():
            same = {"and": [{"eq": ["of", uuid]}, {"eq": ["version", version]}]}
            by_filter = await hits(banks, bank, k=1000, filter=same)
            assert {(hit.document_uuid, hit.text) for hit in by_filter} == {c for c in chunks if c[0] == uuid}
        for mode in (QueryMode.VECTOR, QueryMode.KEYWORD):
            by_search = await hits(banks, bank, "document version says", mode=mode, k=1000)
            assert {(hit.document_uuid, hit.text) for hit in by_search} == chunks
    return state


async def no_orphans(database: Database) -> None:
    """Rows of the parts of documents are rows of documents, and every document has all its parts."""
    none = [
        "FROM {documents} WHERE bank NOT IN (SELECT id FROM {banks})",
        "FROM {chunks} c WHERE bank <> (SELECT bank FROM {documents} d WHERE d.id = c.id >> 20)",
    ]
    parts = [("chunks", "id >> 20"), ("attributes", "document")]
    if database.dialect == "sqlite":
        parts.append(("texts", "rowid >> 20"))
        none.append("FROM {texts} WHERE rowid NOT IN (SELECT id FROM {chunks})")
    for part, key in parts:
        none.append(f"FROM {{{part}}} WHERE {key} NOT IN (SELECT id FROM {{documents}})")
        none.append(f"FROM {{documents}} WHERE id NOT IN (SELECT {key} FROM {{{part}}})")
    async with database.read() as connection:
        for rows in none:
            assert await connection.scalar(database.sql(f"SELECT count(*) {rows}")) == 0, rows


async def indexes_equal_tables(database: Database) -> None:
    """Each chunk has the vector of its own text, and the indexes that the store keeps hold what its tables hold."""
    async with database.write() as connection:
        if database.dialect == "sqlite":
            assert await connection.scalar(database.sql("PRAGMA integrity_check")) == "ok"
            await connection.execute(database.sql("INSERT INTO {texts} ({texts}, rank) VALUES ('integrity-check', 1)"))
            texts = "SELECT c.vector, t.text FROM {chunks} c LEFT JOIN {texts} t ON t.rowid = c.id"
        else:
            graphs = "SELECT indexname FROM pg_indexes WHERE indexdef LIKE '% USING hnsw %'"
            expected = [database.name(f"graph_{n}") for n in await connection.scalars(database.sql(BANKS))]
            assert sorted(await connection.scalars(database.sql(graphs))) == sorted(expected)
            texts = "SELECT CAST(vector AS text) AS vector, text FROM {chunks}"
        for row in await connection.execute(database.sql(texts)):
            stored = np.frombuffer(row.vector, np.float32) if isinstance(row.vector, bytes) else json.loads(row.vector)
            assert np.allclose(stored, HashingEmbedder().embed([row.text])[0], atol=1e-6)


BANKS = "SELECT id FROM {banks}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """Where the rows lie."""
    return "sqlite" if request.param == "sqlite" else str(request.getfixturevalue("postgresql_url"))


async def test_what_was_answered_survives_kill_9(tmp_path: Path, url: str) -> None:
    """Kills at random moments within random operations; each is followed by a look at everything."""
    chance = random.Random(7)
    command = [sys.executable, "-m", "tests.providers.memory.killed", str(tmp_path), url]
    writers = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert writers.stdin is not None
    assert writers.stdout is not None
    expected: State = {}
    answered = cut_off = applied = 0
    killed_in: Counter[str] = Counter()
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
                    await asyncio.sleep(
                        chance.random() ** 2 / 12
                    )  # somewhere within the operation: the moment is the point
                    os.kill(writer, signal.SIGKILL)
                    wanted = 10**9
        async with opened(tmp_path, url) as (banks, database):
            found = await state_of(banks)
            await no_orphans(database)
            await indexes_equal_tables(database)
        assert found in (expected, None if pending is None else after(expected, pending)), seed
        if pending is not None:
            killed_in[pending["op"]] += 1
            cut_off, applied = cut_off + 1, applied + (found != expected)
        expected = found
    writers.stdin.close()
    writers.stdout.close()
    writers.wait()
    assert answered >= KILLS
    assert cut_off > 0
    print(
        f"{KILLS} kills, {answered} writes answered and there; {cut_off} cut off, {applied} of them whole: {killed_in}"
    )
