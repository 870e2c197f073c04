"""Which store a url names, what opening it makes, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llama_stack.errors import StoreError, StoreFailedError, StoreUnavailableError
from llama_stack.storage import open_store
from tests.storage.conftest import NOTES, bodies

pytestmark = pytest.mark.anyio


async def test_sqlite_makes_a_private_folder_and_file(tmp_path: Path) -> None:
    """Conversations lie in it; nobody else on the machine may read them, whatever the umask."""
    folder = tmp_path / "home" / "tiny"
    before = os.umask(0)
    try:
        async with open_store("sqlite", folder) as store:
            await store.blobs("test.notes").put(b"private")
            await store.database("test.notes").migrate(NOTES)
            made = [folder.parent, folder, *folder.rglob("*")]
    finally:
        os.umask(before)
    assert folder / "store.sqlite-wal" in made
    for path in made:
        if path.exists():
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_the_folder_that_the_operator_made_keeps_its_mode(tmp_path: Path) -> None:
    """Whoever shares the folder with a group did so on purpose."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o750)
    async with open_store("sqlite", folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750


@pytest.mark.parametrize("slashes", ["///", "////"])
async def test_an_sqlite_url_names_an_absolute_path(tmp_path: Path, slashes: str) -> None:
    """Three slashes read as in a file url, four as in SQLAlchemy's; both mean the same file, wherever we started."""
    path = tmp_path / "a b.sqlite"
    url = "sqlite:" + slashes + str(path).lstrip("/").replace(" ", "%20")
    async with open_store(url, tmp_path / "state") as store:
        assert store.location == str(path)
    assert path.exists()


async def test_memory_leaves_nothing_behind(tmp_path: Path) -> None:
    """For tests and trials; a second one opened at the same time is another store."""
    async with open_store("sqlite::memory:", tmp_path / "state") as one, open_store("sqlite::memory:", tmp_path) as two:
        for store in (one, two):
            await store.database("test.notes").migrate(NOTES)
        assert await one.blobs("test.notes").get(await one.blobs("test.notes").put(b"x")) == b"x"
        assert await two.blobs("test.notes").digests() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "phrase"),
    [
        ("", "write sqlite"),
        ("mysql://u:secret@h/d", "write sqlite"),
        ("sqlite://relative/path", "write sqlite"),
        ("sqlite:relative.db", "write sqlite"),
        ("sqlite:///", "not a file"),
        ("sqlite:////tmp", "not a file"),
        ("sqlite:////tmp/x%00y", "not a file"),
        ("sqlite:////tmp/x?mode=secret", "no options"),
        ("sqlite:////no/such/folder/x", "make it first"),
        ("postgresql+asyncpg://u:secret@h/d", "write sqlite"),
        ("postgresql://u:secret@h:port/d", "not a valid url"),
        ("postgresql://u:secret@[::1/d", "not a valid url"),
        ("postgresql:///d", "no host"),
        ("postgresql://u:12/secret@h/d", "%2F"),
        ("postgresql://u:12#secret@h/d", "%2F"),
        ("/var/lib/secret.db", "write sqlite"),
    ],
)
async def test_a_url_that_is_not_understood_is_refused_with_the_forms_that_are(
    tmp_path: Path, url: str, phrase: str
) -> None:
    """The message reaches logs and terminals, so no password may be in it."""
    with pytest.raises(StoreError, match=phrase) as refused:
        async with open_store(url, tmp_path):
            pass
    shown = str(refused.value)
    assert "u:" not in shown.replace("USER", "")
    assert url.startswith("/") or "secret" not in shown


async def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    """A mistyped path must not cost a file."""
    file = tmp_path / "letter.txt"
    file.write_bytes(b"Dear Sir or Madam, " * 300)
    with pytest.raises(StoreError, match="cannot be read as an SQLite store"):
        async with open_store(f"sqlite://{file}", tmp_path / "state"):
            pass
    assert file.read_bytes() == b"Dear Sir or Madam, " * 300


async def test_another_programs_database_is_refused_and_kept(tmp_path: Path) -> None:
    """Our tables do not belong in somebody's photo library."""
    file = tmp_path / "photos.db"
    with sqlite3.connect(file) as photos:
        photos.execute("CREATE TABLE photos (id INTEGER)")
    photos.close()
    before = file.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        async with open_store(f"sqlite://{file}", tmp_path / "state"):
            pass
    assert file.read_bytes() == before
    assert not (tmp_path / "photos.db-wal").exists()


async def test_a_state_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StoreError, match="cannot be made"):
        async with open_store("sqlite", tmp_path / "state"):
            pass


async def test_sqlite_syncs_every_commit_and_checks_foreign_keys(tmp_path: Path) -> None:
    """These settings are per connection and silently absent when one forgets them."""
    async with open_store("sqlite", tmp_path) as store:
        database = store.database("test.notes")
        async with database.write() as connection:
            settings = {
                name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
        async with database.read() as connection:
            reader = {
                name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
                for name in ("foreign_keys", "query_only", "busy_timeout")
            }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
    assert reader == {"foreign_keys": 1, "query_only": 1, "busy_timeout": 30000}


def test_importing_the_package_imports_no_database_library() -> None:
    """Listing what is installed, and a stack without storage, must not pay for SQLAlchemy."""
    code = (
        "import sys, llama_stack.storage; "
        "print([n for n in ('sqlalchemy', 'sqlite3', 'aiosqlite', 'asyncpg', 'asyncio', 'anyio') if n in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


async def test_postgresql_that_does_not_answer_is_unavailable_and_shows_no_password(tmp_path: Path) -> None:
    """Port 1 of this machine refuses at once."""
    pytest.importorskip("asyncpg", reason="PostgreSQL is not tested: install asyncpg (the extra 'postgresql')")
    with pytest.raises(StoreUnavailableError) as refused:
        async with open_store("postgresql://alice:secret@127.0.0.1:1/d", tmp_path):
            pass
    assert "secret" not in str(refused.value)
    assert refused.value.status == 503


async def test_postgresql_refuses_a_missing_database_without_the_password(postgresql_url: str, tmp_path: Path) -> None:
    """What the server says is passed on; what we sent is not."""
    url = postgresql_url.replace("postgres:@/", "postgres:secret@/").replace("/test_", "/missing_")
    assert "secret" in url
    with pytest.raises(StoreUnavailableError, match="missing_") as refused:
        async with open_store(url, tmp_path):
            pass
    assert "secret" not in str(refused.value)


async def test_postgresql_commits_synchronously_even_where_the_server_would_not(
    postgresql_url: str, tmp_path: Path
) -> None:
    """``synchronous_commit = off`` acknowledges what a crash of the server loses."""
    import asyncpg  # type: ignore[import-untyped]  # it ships no types

    connection = await asyncpg.connect(postgresql_url)
    database = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {database} SET synchronous_commit = off")
    await connection.close()
    async with open_store(postgresql_url, tmp_path) as store, store.database("test.notes").write() as writing:
        assert (await writing.exec_driver_sql("SHOW synchronous_commit")).scalar_one() == "on"


async def test_postgresql_that_broke_off_is_unavailable_until_it_is_back(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restarted server is found again without a restart of ours; the change under way is not acknowledged."""
    import asyncpg

    from llama_stack.storage import postgresql

    monkeypatch.setattr(postgresql, "RECONNECT_SECONDS", 0.01)
    async with open_store(postgresql_url, tmp_path) as store:
        database = store.database("test.notes")
        await database.migrate(NOTES)

        async def broken_off() -> None:
            async with database.write() as connection:
                await connection.execute(database.sql("INSERT INTO {notes} VALUES (1, 'lost')"))
                other = await asyncpg.connect(postgresql_url)
                await other.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                    " WHERE application_name = 'llama-stack' AND datname = current_database()"
                )
                await other.close()

        with pytest.raises(StoreUnavailableError):
            await broken_off()
        was_lost = not store.healthy
        assert was_lost
        while not store.healthy:  # nothing is sent to it meanwhile: readiness keeps requests away
            await asyncio.sleep(0.001)
        assert await bodies(database) == []
        async with database.write() as connection:
            await connection.execute(database.sql("INSERT INTO {notes} VALUES (2, 'kept')"))
        assert await bodies(database) == ["kept"]


async def test_the_first_reason_for_a_failure_stays(tmp_path: Path) -> None:
    """What follows a failure is only its consequence; the operator needs the cause."""
    from llama_stack.storage.database import Health

    health = Health()
    health.fail("the first")
    health.fail("the second")
    assert health.fault == "the first"
    assert not health.healthy
    with pytest.raises(StoreFailedError, match="the first"):
        health.require_writable()


async def test_closing_waits_for_nothing_and_leaves_one_clean_file(tmp_path: Path) -> None:
    """After a clean stop the log is in the file, so that a copy of the file is a whole backup."""
    async with open_store("sqlite", tmp_path) as store:
        database = store.database("test.notes")
        await database.migrate(NOTES)
        await asyncio.gather(*(bodies(database) for _ in range(20)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.sqlite", "store.sqlite.ballast"]
