"""What the storage tests run in other processes, to be killed, limited or raced: ``children.py ACTION URL FOLDER``.

A child prints one line for each thing that it was told is done; the test reads the lines.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import anyio.to_thread  # noqa: F401  this and what follows: once, not in each fork
from sqlalchemy.dialects.sqlite import aiosqlite  # noqa: F401
from sqlalchemy.ext.asyncio import AsyncConnection

import llama_stack.storage.sqlite  # noqa: F401
from llama_stack.errors import StackError
from llama_stack.storage import Database, Migration, open_store

OWNER = "test.pairs"
PAIRS = (
    Migration(
        number=1,
        description="pairs",
        statements=("CREATE TABLE {pairs} (number INTEGER, half INTEGER, filler TEXT, PRIMARY KEY (number, half))",),
    ),
)
INSERT = "INSERT INTO {pairs} (number, half, filler) VALUES (:number, :half, :filler)"


def say(line: str) -> None:
    # One write call, so that a killed child leaves no half line.
    os.write(1, f"{line}\n".encode())


async def insert_pair(database: Database, number: int, filler_bytes: int = 500) -> None:
    async with database.write() as connection:
        for half in (1, 2):
            await connection.execute(
                database.sql(INSERT), {"number": number, "half": half, "filler": "x" * filler_bytes}
            )


async def next_number(database: Database) -> int:
    async with database.read() as connection:
        last = (await connection.execute(database.sql("SELECT max(number) FROM {pairs}"))).scalar_one()
    return 0 if last is None else int(last) + 1


async def write_pairs(url: str, folder: Path) -> None:
    """Insert pairs until killed, saying each number once its block has ended."""
    async with open_store(url, folder) as store:
        database = store.database(OWNER)
        await database.migrate(PAIRS)
        number = await next_number(database)
        while True:
            await insert_pair(database, number)
            say(f"done {number}")
            number += 1


def fork_writers(url: str, folder: Path) -> None:
    """A writer for each line of input. Forked, because the imports take longer than the work."""
    if url != "sqlite":
        import llama_stack.storage.postgresql  # noqa: F401
    for _ in sys.stdin:
        writer = os.fork()
        if writer == 0:
            asyncio.run(write_pairs(url, folder))
        say(f"started {writer}")
        os.waitpid(writer, 0)
        say("ended")


async def try_pairs(url: str, folder: Path) -> None:
    """Insert 40 pairs and say how each went; then whether reading still works."""
    async with open_store(url, folder) as store:
        database = store.database(OWNER)
        await database.migrate(PAIRS)
        for number in range(40):
            try:
                await insert_pair(database, number)
                say(f"done {number}")
            except StackError as error:
                say(f"{error.code} {number}")
        say(f"healthy {store.healthy}")
        say(f"readable {await next_number(database)}")


async def limited_pairs(url: str, folder: Path) -> None:
    """The same, where the system refuses to let a file grow past 200 kB: an I/O error, as from a failing disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    await try_pairs(url, folder)


async def fill_and_free(url: str, folder: Path) -> None:
    """Fill the disk, then delete, then go on, saying how each step went."""
    async with open_store(url, folder) as store:
        database = store.database(OWNER)
        await database.migrate(PAIRS)
        number = 0
        for filler_bytes in (100_000, 1_000, 1):
            try:
                while True:
                    await insert_pair(database, number, filler_bytes)
                    number += 1
            except StackError as error:
                say(error.code)
        say(f"readable {await next_number(database) == number}")
        try:
            with (folder / "else").open("wb") as other:  # whatever was left, somebody else took
                while other.write(b"x" * 512):
                    other.flush()
        except OSError:
            pass
        for attempt in range(4):
            try:
                async with database.write(frees_space=attempt > 0) as connection:
                    await connection.execute(
                        database.sql("DELETE FROM {pairs} WHERE number % 5 = :attempt"), {"attempt": attempt}
                    )
                say("deleted")
            except StackError as error:
                say(f"delete {error.code}")
        await insert_pair(database, number, 50_000)
        say("inserted again")
        say(f"healthy {store.healthy}")


async def stop_half_way(url: str, folder: Path) -> None:
    """Begin a migration that makes a table, fills it, says so, and never ends."""

    async def fill(connection: AsyncConnection, database: Database) -> None:
        await connection.exec_driver_sql(database.expand("CREATE TABLE {big} (id INTEGER PRIMARY KEY, body TEXT)"))
        for id in range(300):
            await connection.execute(
                database.sql("INSERT INTO {big} (id, body) VALUES (:id, :body)"), {"id": id, "body": "x" * 20_000}
            )
        say("half")
        await asyncio.Event().wait()

    async with open_store(url, folder) as store:
        await store.database(OWNER).migrate([*PAIRS, Migration(number=2, description="a big table", run=fill)])


async def migrate_at_once(url: str, folder: Path) -> None:
    """Wait for a line of input, then open the store and migrate it; each migration adds one row that counts it."""

    def counted(number: int) -> Migration:
        async def run(connection: AsyncConnection, database: Database) -> None:
            if number == 1:
                await connection.exec_driver_sql(database.expand("CREATE TABLE {runs} (number INTEGER)"))
            await connection.execute(database.sql("INSERT INTO {runs} VALUES (:number)"), {"number": number})

        return Migration(number=number, description=f"count {number}", run=run)

    say("ready")
    sys.stdin.readline()
    async with open_store(url, folder) as store:
        await store.database("test.runs").migrate([counted(number) for number in range(1, 6)])
    say("done")


if __name__ == "__main__":
    action, url, folder = sys.argv[1:]
    if action == "fork_writers":
        fork_writers(url, Path(folder))
    else:
        actions = (try_pairs, limited_pairs, fill_and_free, stop_half_way, migrate_at_once)
        asyncio.run({each.__name__: each for each in actions}[action](url, Path(folder)))
