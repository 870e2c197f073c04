"""What a provider may rely on, on either store."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, insert, inspect, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from llama_stack.errors import StoreBusyError, StoreError, StoreFailedError
from llama_stack.storage import Database, Migration, Store, open_store
from tests.storage.conftest import NOTES, bodies

pytestmark = pytest.mark.anyio

INSERT = "INSERT INTO {notes} (id, body) VALUES (:id, :body)"


async def add(database: Database, id: int, body: str) -> None:
    async with database.write() as connection:
        await connection.execute(database.sql(INSERT), {"id": id, "body": body})


async def test_a_write_block_that_ended_is_seen_by_the_next_reader(notes: Database) -> None:
    """The acknowledgement that a request gets after the block must be true."""
    await add(notes, 1, "first")
    assert await bodies(notes) == ["first"]


async def test_an_exception_in_a_write_block_undoes_all_of_it(notes: Database) -> None:
    """A request applies whole or not at all."""

    async def fail() -> None:
        async with notes.write() as connection:
            await connection.execute(notes.sql(INSERT), {"id": 1, "body": "half"})
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await bodies(notes) == []


async def test_a_cancelled_write_block_is_undone_and_frees_the_writer(notes: Database) -> None:
    """A client that leaves in the middle must not leave half a change, nor the lock."""
    inserted = asyncio.Event()

    async def abandoned() -> None:
        async with notes.write() as connection:
            await connection.execute(notes.sql(INSERT), {"id": 1, "body": "half"})
            inserted.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(abandoned())
    await inserted.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await add(notes, 2, "next")
    assert await bodies(notes) == ["next"]


async def test_a_cancelled_scope_is_undone_and_frees_the_writer(notes: Database) -> None:
    """The server cancels by anyio scopes, which cancel again at every await, also during the rollback."""
    with anyio.CancelScope() as scope:
        async with notes.write() as connection:
            await connection.execute(notes.sql(INSERT), {"id": 1, "body": "half"})
            scope.cancel()
            await anyio.sleep_forever()
    await add(notes, 2, "next")
    assert await bodies(notes) == ["next"]


async def test_cancelling_at_any_step_leaves_whole_rows_and_a_working_store(notes: Database) -> None:
    """Each turn of the loop is one possible moment of cancellation; pairs must stay pairs at all of them."""

    async def pair(number: int) -> None:
        async with notes.write() as connection:
            await connection.execute(notes.sql(INSERT), {"id": 2 * number, "body": f"pair {number}"})
            await connection.execute(notes.sql(INSERT), {"id": 2 * number + 1, "body": f"pair {number}"})

    finished = 0
    for number in range(60):
        task = asyncio.create_task(pair(number))
        for _ in range(number // 2):
            await asyncio.sleep(0)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert outcome is None or isinstance(outcome, asyncio.CancelledError)
        finished += outcome is None
    kept = await bodies(notes)
    assert kept == sorted(kept, key=lambda body: int(body.split()[1]))
    assert all(kept.count(body) == 2 for body in kept)
    assert len(kept) >= 2 * finished
    await add(notes, 1000, "after")


async def test_a_read_block_sees_one_state_and_is_not_held_up_by_a_writer(notes: Database) -> None:
    """A list and its count read in one block must agree, whatever is written meanwhile."""
    await add(notes, 1, "first")
    async with notes.read() as connection:
        before = (await connection.execute(notes.sql("SELECT count(*) FROM {notes}"))).scalar_one()
        await add(notes, 2, "second")
        after = (await connection.execute(notes.sql("SELECT count(*) FROM {notes}"))).scalar_one()
    assert (before, after) == (1, 1)
    async with notes.write() as connection:
        await connection.execute(notes.sql(INSERT), {"id": 3, "body": "open"})
        assert await bodies(notes) == ["first", "second"]


async def test_a_read_block_cannot_write(notes: Database) -> None:
    """A write outside of a write block would not be serialised, nor be durable at its end."""
    with pytest.raises(DBAPIError, match=r"readonly|read-only"):
        async with notes.read() as connection:
            await connection.execute(notes.sql(INSERT), {"id": 1, "body": "smuggled"})
    assert await bodies(notes) == []


async def test_what_is_read_at_once_is_one_state_and_sees_every_commit(notes: Database) -> None:
    """It stands for a read block where a request must answer within a millisecond."""
    sql = notes.expand("SELECT body FROM {notes} ORDER BY id")
    loop = asyncio.get_running_loop()

    def look(connection: sqlite3.Connection) -> list[list[str]]:
        before = [body for (body,) in connection.execute(sql)]
        asyncio.run_coroutine_threadsafe(add(notes, 2, "second"), loop).result()
        return [before, [body for (body,) in connection.execute(sql)]]

    if notes.dialect != "sqlite":
        with pytest.raises(RuntimeError, match="use read"):
            await notes.read_at_once(look)
        return
    await add(notes, 1, "first")
    assert await notes.read_at_once(look) == [["first"], ["first"]]
    assert await notes.read_at_once(lambda connection: connection.execute(sql).fetchall()) == [("first",), ("second",)]


async def test_what_is_read_at_once_cannot_write_and_fails_alone(tmp_path: Path) -> None:
    """A mistake in one provider's SQL must not reach the data, nor the next request on that thread."""
    async with open_store("sqlite", tmp_path) as store:
        notes = store.database("test.notes")
        await notes.migrate(NOTES)
        sql = notes.expand("INSERT INTO {notes} (id, body) VALUES (1, 'a')")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            await notes.read_at_once(lambda connection: connection.execute(sql))
        count = notes.expand("SELECT count(*) FROM {notes}")
        assert await notes.read_at_once(lambda connection: connection.execute(count).fetchone()) == (0,)
        assert store.healthy


async def test_a_cancelled_caller_waits_for_what_is_read_at_once(tmp_path: Path) -> None:
    """Whoever holds a lock around it would else give it back while the thread still looks."""
    async with open_store("sqlite", tmp_path) as store:
        notes = store.database("test.notes")
        begun, may_end = threading.Event(), threading.Event()

        def look(connection: sqlite3.Connection) -> None:
            begun.set()
            assert may_end.wait(10)
            raise LookupError  # nobody hears of it, the log neither

        task = asyncio.create_task(notes.read_at_once(look))
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_damaged_page_met_while_reading_at_once_stops_the_store(tmp_path: Path) -> None:
    """The driver's error means the same as in a read block."""
    async with open_store("sqlite", tmp_path) as store:
        notes = store.database("test.notes")

        def damaged(connection: sqlite3.Connection) -> None:
            error = sqlite3.DatabaseError("database disk image is malformed")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_CORRUPT, "SQLITE_CORRUPT"
            raise error

        with pytest.raises(StoreFailedError, match="malformed"):
            await notes.read_at_once(damaged)
        assert not store.healthy


async def test_many_readers_and_writers_at_once_lose_nothing(notes: Database) -> None:
    """More readers than connections wait for one; every count that is read was true at some moment."""
    seen: list[int] = []

    async def count() -> None:
        async with notes.read() as connection:
            seen.append((await connection.execute(notes.sql("SELECT count(*) FROM {notes}"))).scalar_one())

    await asyncio.gather(*(add(notes, id, "x") for id in range(40)), *(count() for _ in range(40)))
    assert len(await bodies(notes)) == 40
    assert all(0 <= number <= 40 for number in seen)


async def test_what_a_write_block_read_stays_true_until_it_ends(url: str, tmp_path: Path) -> None:
    """Read, decide, write is how providers are written; two processes must not both see the old value."""
    async with open_store(url, tmp_path / "state") as one, open_store(url, tmp_path / "state") as two:
        databases = [one.database("test.notes"), two.database("test.notes")]
        await databases[0].migrate(NOTES)
        await add(databases[0], 1, "0")

        async def increment(database: Database) -> None:
            async with database.write() as connection:
                value = int((await connection.execute(database.sql("SELECT body FROM {notes}"))).scalar_one())
                await connection.execute(database.sql("UPDATE {notes} SET body = :body"), {"body": str(value + 1)})

        await asyncio.gather(*(increment(databases[number % 2]) for number in range(40)))
        assert await bodies(databases[1]) == ["40"]


async def test_a_write_block_inside_a_write_block_is_refused(notes: Database) -> None:
    """It would wait for itself until the timeout; the mistake should show the first time."""
    async with notes.write():
        with pytest.raises(RuntimeError, match="inside a write block"):
            async with notes.write():
                pass


async def test_a_writer_that_waits_too_long_is_refused_as_busy(url: str, tmp_path: Path) -> None:
    """A queue without a bound hides a stuck writer from every client."""
    async with open_store(url, tmp_path / "state", busy_timeout_seconds=0.2) as store:
        database = store.database("test.notes")
        await database.migrate(NOTES)
        async with database.write():
            with pytest.raises(StoreBusyError):
                await asyncio.create_task(add(database, 1, "late"))


async def test_a_writer_of_another_process_that_holds_on_too_long_makes_us_busy(url: str, tmp_path: Path) -> None:
    """The bound on waiting holds across processes too, and is an answer, not a crash."""
    async with (
        open_store(url, tmp_path / "state") as other,
        open_store(url, tmp_path / "state", busy_timeout_seconds=0.2) as store,
    ):
        database = store.database("test.notes")
        await database.migrate(NOTES)
        async with other.database("test.notes").write() as connection:
            await connection.execute(database.sql(INSERT), {"id": 1, "body": "held"})
            with pytest.raises(StoreBusyError):
                await asyncio.create_task(add(database, 2, "late"))
        await add(database, 3, "free again")
        assert await bodies(database) == ["held", "free again"]
        assert store.healthy


async def test_a_broken_constraint_reaches_the_provider_as_such(notes: Database) -> None:
    """Only the provider can say what a duplicate id means: the same contents again, or a conflict."""
    await add(notes, 1, "first")
    with pytest.raises(IntegrityError):
        await add(notes, 1, "again")
    await add(notes, 2, "second")
    assert await bodies(notes) == ["first", "second"]


async def test_a_failed_statement_that_was_swallowed_never_ends_in_a_false_success(notes: Database) -> None:
    """PostgreSQL answers COMMIT after a failed statement by rolling back, without a word."""
    acknowledged = False
    try:
        async with notes.write() as connection:
            await connection.execute(notes.sql(INSERT), {"id": 1, "body": "first"})
            with suppress(IntegrityError):
                await connection.execute(notes.sql(INSERT), {"id": 1, "body": "again"})
        acknowledged = True
    except DBAPIError:
        pass
    assert await bodies(notes) == (["first"] if acknowledged else [])


async def test_a_savepoint_undoes_a_failed_statement_and_keeps_the_rest(notes: Database) -> None:
    """This is how a provider inserts unless present, on both stores."""
    async with notes.write() as connection:
        await connection.execute(notes.sql(INSERT), {"id": 1, "body": "first"})
        with pytest.raises(IntegrityError):
            async with connection.begin_nested():
                await connection.execute(notes.sql(INSERT), {"id": 1, "body": "again"})
        await connection.execute(notes.sql(INSERT), {"id": 2, "body": "second"})
    assert await bodies(notes) == ["first", "second"]


async def test_values_are_never_read_as_sql(notes: Database) -> None:
    """Bound values come back as they went in, hostile or not."""
    hostile = ["'; DROP TABLE {notes}; --", "{notes}", ":id", "\\", "%s", "?", "$1", '"', "é\u202e🦙"]
    for id, body in enumerate(hostile):
        await add(notes, id, body)
    assert await bodies(notes) == hostile


async def test_sqlalchemy_tables_work_with_the_owners_names(notes: Database) -> None:
    """A provider may write SQLAlchemy Core instead of text."""
    table = Table(notes.name("notes"), MetaData(), Column("id", Integer, primary_key=True), Column("body", Text))
    async with notes.write() as connection:
        await connection.execute(insert(table), [{"id": 1, "body": "one"}, {"id": 2, "body": "two"}])
    async with notes.read() as connection:
        assert list(await connection.scalars(select(table.c.body).order_by(table.c.id))) == ["one", "two"]


async def test_owners_with_the_same_table_names_do_not_meet(store: Store) -> None:
    """Two instances of one provider each have their own notes."""
    one, two = store.database("test.one"), store.database("test.two")
    await one.migrate(NOTES)
    await two.migrate(NOTES)
    await add(one, 1, "mine")
    assert (await bodies(one), await bodies(two)) == (["mine"], [])


async def test_braces_that_name_no_table_stay_as_they_are(notes: Database) -> None:
    """JSON in a statement is common: '{}' as a default, '{"a": 1}' as a value."""
    assert (
        notes.expand("""SELECT '{}', '{"a": 1}', {notes}.id""") == """SELECT '{}', '{"a": 1}', test_notes__notes.id"""
    )


@pytest.mark.parametrize("owner", ["", "Upper", "a b", "_a", "1a", "é", "sqlite.x", "pg", "a\n", 'a"'])
async def test_an_owner_that_cannot_name_tables_is_refused(store: Store, owner: str) -> None:
    """An owner begins identifiers, so it is checked before any statement is made of it."""
    with pytest.raises(ValueError, match="owner"):
        store.database(owner)


async def test_two_owners_that_would_share_names_are_refused(store: Store) -> None:
    """'a.b' and 'a_b' both begin their tables with a_b__; so would the stack's own name."""
    store.database("a.b")
    store.database("a.b")
    with pytest.raises(StoreError, match="share"):
        store.blobs("a_b")
    with pytest.raises(ValueError, match="the stack itself"):
        store.database("llama_stack")


async def test_every_id_that_a_distribution_allows_is_an_owner(store: Store) -> None:
    """Ids may end in a separator or repeat one; their tables must still be told apart."""
    names = [store.database(f"memory_banks.{id}").name("notes") for id in ("a", "a-", "a--", "a_", "0", "-" * 60)]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 63 for name in names)


async def test_long_owners_keep_their_tables_apart(store: Store) -> None:
    """Operators choose ids of any length, and PostgreSQL would silently cut both names to the same 63 characters."""
    one, two = (store.database("synthetic_data_generation.a-rather-long-name-for-a-provider-" + end) for end in "ab")
    table = "t" * 30
    assert len(one.name(table)) == 63
    for database in (one, two):
        await database.migrate(
            [Migration(number=1, description="x", statements=(f"CREATE TABLE {{{table}}} (id INT)",))]
        )
    async with one.read() as connection:
        tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    assert {one.name(table), two.name(table)} <= set(tables)
    assert one.name(table) != two.name(table)


@pytest.mark.parametrize("table", ["", "Notes", "a-b", "a;b", "x" * 31, "notes\n", 'a"b'])
async def test_a_table_name_that_is_no_plain_identifier_is_refused(notes: Database, table: str) -> None:
    """Names are put into SQL as they are, so nothing but a plain identifier may pass."""
    with pytest.raises(ValueError, match="table name"):
        notes.name(table)


async def test_the_store_is_healthy_and_says_where_it_is(store: Store) -> None:
    """Readiness reads the one, the operator the other."""
    assert store.healthy
    assert store.fault is None
    assert store.location
