"""Both stores, so that a rule that holds on SQLite is seen to hold on PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
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
