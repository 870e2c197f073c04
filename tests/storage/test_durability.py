"""What survives a kill, a full disk and a failing one. The children are real processes and the store is a real one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect

from llama_stack.errors import StorageFullError, StoreFailedError, StoreTooNewError
from llama_stack.storage import Database, Migration, open_store
from tests.storage.children import OWNER, PAIRS, insert_pair, next_number
from tests.storage.conftest import NOTES, bodies

pytestmark = pytest.mark.anyio

KILLS = 30


def child(action: str, url: str, folder: Path, *before: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, "-m", "tests.storage.children", action, url, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()


def send(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait()


async def pairs_in(url: str, folder: Path) -> dict[int, int]:
    """How many halves of each pair the store has."""
    async with open_store(url, folder) as store:
        database = store.database(OWNER)
        async with database.read() as connection:
            rows = await connection.execute(
                database.sql("SELECT number, count(*) AS halves FROM {pairs} GROUP BY number")
            )
            return {row.number: row.halves for row in rows}


async def test_what_was_acknowledged_survives_kill_9(url: str, tmp_path: Path) -> None:
    """The promise of the store: 30 kills at random moments lose no acknowledged pair and leave no half of one."""
    chance = random.Random(4)
    acknowledged: set[int] = set()
    writers = child("fork_writers", url, tmp_path)
    lines = lines_of(writers)
    for _ in range(KILLS):
        send(writers, "go")
        writer = int(next(lines).removeprefix("started "))
        wanted = chance.randrange(1, 12)
        seen = 0
        while seen < wanted:
            acknowledged.add(int(next(lines).removeprefix("done ")))
            seen += 1
        await asyncio.sleep(chance.random() / 100)  # somewhere within the next writes: the moment is the point
        os.kill(writer, signal.SIGKILL)
        for line in lines:
            if line == "ended":
                break
            acknowledged.add(int(line.removeprefix("done ")))
    end(writers)
    found = await pairs_in(url, tmp_path)
    assert len(acknowledged) > KILLS
    assert acknowledged <= found.keys()
    assert set(found.values()) == {2}
    assert len(found) <= len(acknowledged) + KILLS
    if url == "sqlite":
        with sqlite3.connect(tmp_path / "store.sqlite") as file:
            assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        file.close()


async def test_a_migration_that_was_killed_half_way_is_absent_and_can_be_applied(url: str, tmp_path: Path) -> None:
    """Whole or absent: 6 MB of it were written, some to the disk already, and none may be seen."""
    process = child("stop_half_way", url, tmp_path)
    assert next(lines_of(process)) == "half"
    process.kill()
    end(process)
    big = Migration(number=2, description="a big table", statements=("CREATE TABLE {big} (id INTEGER)",))
    async with open_store(url, tmp_path) as store:
        database = store.database(OWNER)
        async with database.read() as connection:
            tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        assert sorted(tables) == ["llama_stack_migrations", database.name("pairs")]
        await database.migrate([*PAIRS, big])
        await insert_pair(database, 1)


async def test_processes_that_migrate_at_once_apply_each_migration_once(url: str, tmp_path: Path) -> None:
    """Several servers started together on a new store is how a deployment begins."""
    processes = [child("migrate_at_once", url, tmp_path) for _ in range(3)]
    for process in processes:
        assert next(lines_of(process)) == "ready"
    for process in processes:
        send(process, "go")
    said = [next(lines_of(process), "failed") for process in processes]
    for process in processes:
        end(process)
    assert said == ["done"] * 3
    async with open_store(url, tmp_path) as store:
        database = store.database("test.runs")
        async with database.read() as connection:
            runs = await connection.scalars(database.sql("SELECT number FROM {runs} ORDER BY number"))
            assert list(runs) == [1, 2, 3, 4, 5]


async def test_opening_a_new_file_from_many_stores_at_once_works(tmp_path: Path) -> None:
    """The switch to WAL takes a lock that SQLite does not always wait for."""

    async def open_once() -> None:
        async with open_store("sqlite", tmp_path / "state") as store:
            await store.database("test.notes").migrate(NOTES)

    await asyncio.gather(*(open_once() for _ in range(12)))


async def _halves(database: Database) -> list[int]:
    async with database.read() as connection:
        return list(await connection.scalars(database.sql("SELECT half FROM {pairs}")))


async def test_a_full_database_is_507_and_recovers_without_a_restart(tmp_path: Path) -> None:
    """Nothing of the refused block is applied, reads go on, and with room again so do writes."""
    async with open_store("sqlite", tmp_path / "state") as store:
        database = store.database(OWNER)
        await database.migrate(PAIRS)
        async with database.write() as connection:
            await connection.exec_driver_sql("PRAGMA max_page_count = 30")

        async def fill() -> None:
            for number in range(1000):
                await insert_pair(database, number, 2000)

        with pytest.raises(StorageFullError) as refused:
            await fill()
        assert refused.value.status == 507
        written = await next_number(database)
        assert 0 < written < 1000
        assert len(await _halves(database)) == 2 * written
        assert store.healthy
        async with database.write() as connection:
            await connection.exec_driver_sql("PRAGMA max_page_count = 1000")
        await insert_pair(database, written)
        assert await next_number(database) == written + 1


def _can_mount() -> bool:
    unshare = shutil.which("unshare")
    mount = ["--mount", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    return unshare is not None and subprocess.run([unshare, *mount], capture_output=True).returncode == 0


async def test_deleting_works_on_a_full_disk_and_makes_room(tmp_path: Path) -> None:
    """On a full disk SQLite cannot even delete: its log has to grow first. The store keeps room for that."""
    if not _can_mount():
        pytest.skip("mounting a small file system needs root and CAP_SYS_ADMIN")
    mount = 'mount -t tmpfs -o size=12m none "$1" && shift && exec "$@"'
    process = child("fill_and_free", "sqlite", tmp_path, "unshare", "--mount", "sh", "-c", mount, "sh", str(tmp_path))
    said = list(lines_of(process))
    end(process)
    assert said == [
        *["storage_full"] * 3,
        "readable True",
        "delete storage_full",
        *["deleted"] * 3,
        "inserted again",
        "healthy True",
    ]


def _check_nothing_follows_a_failure(said: list[str]) -> list[int]:
    """The acknowledged numbers, having checked that all of them came before the first failure."""
    outcomes = [line.split() for line in said]
    numbered = [outcome for outcome in outcomes if outcome[0] in ("done", "store_failed")]
    done = [int(number) for outcome, number in numbered if outcome == "done"]
    assert len(numbered) == 40
    assert 0 < len(done) < 40
    assert done == list(range(len(done)))
    assert ["healthy", "False"] in outcomes
    assert ["readable", str(len(done))] in outcomes
    return done


async def test_after_a_write_error_nothing_is_acknowledged_until_a_restart(tmp_path: Path) -> None:
    """SQLite itself would take the next commit; what the disk holds by then, nobody knows."""
    process = child("limited_pairs", "sqlite", tmp_path / "state")
    said = list(lines_of(process))
    end(process)
    done = _check_nothing_follows_a_failure(said)
    assert set(done) <= (await pairs_in("sqlite", tmp_path / "state")).keys()


@pytest.mark.parametrize("nth", [12, 25])
async def test_after_a_failed_sync_nothing_is_acknowledged_until_a_restart(tmp_path: Path, nth: int) -> None:
    """The kernel reports a lost page once; the next sync succeeds and would vouch for it."""
    strace = shutil.which("strace")
    inject = f"inject=fdatasync:error=EIO:when={nth}"
    tracer = [strace or "", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", "trace=fdatasync", "-e", inject]
    if strace is None or subprocess.run([*tracer, "true"], capture_output=True).returncode:
        pytest.skip("injecting a failed sync needs strace and the right to trace")
    process = child("try_pairs", "sqlite", tmp_path / "state", *tracer)
    said = list(lines_of(process))
    end(process)
    assert (tmp_path / "trace").read_text().count("(INJECTED)") == 1
    done = _check_nothing_follows_a_failure(said)
    assert set(done) <= (await pairs_in("sqlite", tmp_path / "state")).keys()


async def test_a_damaged_file_stops_writes_and_says_so(tmp_path: Path) -> None:
    """A page that is not a page any more: no write may build on it."""
    folder = tmp_path / "state"
    async with open_store("sqlite", folder) as store:
        database = store.database(OWNER)
        await database.migrate(PAIRS)
        for number in range(200):
            await insert_pair(database, number)
    file = folder / "store.sqlite"
    contents = bytearray(file.read_bytes())
    contents[4096 * 6 :] = b"\xff" * (len(contents) - 4096 * 6)
    file.write_bytes(contents)
    async with open_store("sqlite", folder) as store:
        database = store.database(OWNER)
        with pytest.raises(StoreFailedError, match="malformed"):
            async with database.read() as connection:
                await connection.execute(database.sql("SELECT sum(length(filler)) FROM {pairs}"))
        assert not store.healthy
        assert store.fault is not None
        with pytest.raises(StoreFailedError, match="restart"):
            await insert_pair(database, 1000)


def fingerprint(folder: Path) -> str:
    """A hash of every name and byte under ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(
        json.dumps([(str(path), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]).encode()
    ).hexdigest()


def notes_up_to(number: int) -> list[Migration]:
    later = [
        Migration(number=each, description=f"step {each}", statements=(f"CREATE TABLE {{step_{each}}} (id INTEGER)",))
        for each in range(2, number + 1)
    ]
    return [*NOTES, *later]


async def test_a_store_that_a_newer_version_wrote_is_not_touched(tmp_path: Path) -> None:
    """An operator who started the old version by mistake can go back: every byte is as it was."""
    folder = tmp_path / "state"
    async with open_store("sqlite", folder) as store:
        await store.database("test.notes").migrate(notes_up_to(3))
    before = fingerprint(folder)
    async with open_store("sqlite", folder) as store:
        with pytest.raises(StoreTooNewError) as refused:
            await store.database("test.notes").migrate(notes_up_to(2))
    assert fingerprint(folder) == before
    assert (refused.value.owner, refused.value.found, refused.value.known) == ("test.notes", 3, 2)
    assert "Install the version" in str(refused.value)
    with sqlite3.connect(folder / "store.sqlite") as file:
        file.execute("INSERT INTO llama_stack_migrations VALUES ('llama_stack', 2, 'of the future', '', '')")
    file.close()
    before = fingerprint(folder)
    with pytest.raises(StoreTooNewError, match="llama_stack"):
        async with open_store("sqlite", folder):
            pass
    assert fingerprint(folder) == before


async def test_what_was_written_is_there_after_a_restart(url: str, tmp_path: Path) -> None:
    """The plain case, on both stores."""
    async with open_store(url, tmp_path / "state") as store:
        database = store.database("test.notes")
        await database.migrate(NOTES)
        async with database.write() as connection:
            await connection.execute(database.sql("INSERT INTO {notes} VALUES (1, 'kept')"))
    async with open_store(url, tmp_path / "state") as store:
        database = store.database("test.notes")
        await database.migrate(NOTES)
        assert await bodies(database) == ["kept"]
