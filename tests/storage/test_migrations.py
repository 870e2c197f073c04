"""Each change to the tables is applied once, whole, in order, and only if it is what it was."""

from __future__ import annotations

import pytest
from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import AsyncConnection

from llama_stack.errors import MigrationChangedError, MigrationFailedError, StoreError, StoreTooNewError
from llama_stack.storage import Database, Migration, Store
from tests.storage.conftest import NOTES, bodies

pytestmark = pytest.mark.anyio


def second(*statements: str) -> list[Migration]:
    return [*NOTES, Migration(number=2, description="the second", statements=statements)]


async def table_names(database: Database) -> set[str]:
    async with database.read() as connection:
        return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))


async def test_migrations_are_applied_once_and_in_order(store: Store) -> None:
    """The second start finds nothing to do, and a later release only adds what is new."""
    database = store.database("test.notes")
    await database.migrate(NOTES)
    await database.migrate(NOTES)
    await database.migrate(second("INSERT INTO {notes} VALUES (1, 'from the second')"))
    await database.migrate(second("INSERT INTO {notes} VALUES (1, 'from the second')"))
    assert await bodies(database) == ["from the second"]


async def test_each_owner_has_its_own_numbers(store: Store) -> None:
    """Two plugins both begin with migration 1."""
    one, two = store.database("test.one"), store.database("test.two")
    await one.migrate(second("CREATE TABLE {extra} (id INTEGER)"))
    await two.migrate(NOTES)
    assert {one.name("extra"), two.name("notes")} <= await table_names(one)
    assert two.name("extra") not in await table_names(one)


async def test_a_function_can_migrate_what_sql_alone_cannot(store: Store) -> None:
    """Its writes are in the same transaction as the record that it ran."""

    async def shout(connection: AsyncConnection, database: Database) -> None:
        for body in list(await connection.scalars(database.sql("SELECT body FROM {notes}"))):
            await connection.execute(
                database.sql("UPDATE {notes} SET body = :new WHERE body = :old"), {"new": body.upper(), "old": body}
            )

    database = store.database("test.notes")
    await database.migrate(second("INSERT INTO {notes} VALUES (1, 'quiet')"))
    await database.migrate(
        [
            *second("INSERT INTO {notes} VALUES (1, 'quiet')"),
            Migration(number=3, description="capitals", run=shout),
        ]
    )
    assert await bodies(database) == ["QUIET"]


async def test_a_failed_migration_leaves_nothing_and_names_itself(store: Store) -> None:
    """The first of its two statements succeeded; the store must be as it was before, and usable."""
    database = store.database("test.notes")
    with pytest.raises(MigrationFailedError, match=r"migration 2 of 'test.notes' \(the second\) failed and was undone"):
        await database.migrate(second("CREATE TABLE {half} (id INTEGER)", "CREATE TABLE {half} (id INTEGER)"))
    assert database.name("half") not in await table_names(database)
    await database.migrate(second("CREATE TABLE {whole} (id INTEGER)"))
    assert database.name("whole") in await table_names(database)


async def test_a_function_that_raises_undoes_its_migration(store: Store) -> None:
    """Our own errors pass as they are; any other is named as the cause."""

    async def fail(connection: AsyncConnection, database: Database) -> None:
        await connection.exec_driver_sql(database.expand("CREATE TABLE {half} (id INTEGER)"))
        raise LookupError("no such file")

    database = store.database("test.notes")
    with pytest.raises(MigrationFailedError, match="no such file"):
        await database.migrate([*NOTES, Migration(number=2, description="files", run=fail)])
    assert database.name("half") not in await table_names(database)


async def test_an_edited_migration_is_refused(store: Store) -> None:
    """Two installations that both say 2 must have the same tables; new layout of the same SQL is no edit."""
    database = store.database("test.notes")
    await database.migrate(second("CREATE TABLE {extra} (id INTEGER)"))
    await database.migrate(second("CREATE TABLE {extra}\n    (id INTEGER)"))
    with pytest.raises(MigrationChangedError, match="was edited"):
        await database.migrate(second("CREATE TABLE {extra} (id BIGINT)"))


async def test_a_store_of_a_newer_version_is_refused(store: Store) -> None:
    """An old version cannot know what the new tables mean."""
    database = store.database("test.notes")
    await database.migrate(second("CREATE TABLE {extra} (id INTEGER)"))
    with pytest.raises(StoreTooNewError, match="at migration 2 and this version knows 1"):
        await database.migrate(NOTES)
    with pytest.raises(StoreError):
        await database.migrate([])


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE chunks (id INTEGER)",
        "CREATE TABLE test_other__notes_2 (id INTEGER)",
        "ALTER TABLE test_other__notes ADD COLUMN extra TEXT",
        "DROP TABLE test_other__notes",
        "CREATE VIEW every_note AS SELECT 1 AS one",
    ],
)
async def test_a_migration_may_only_touch_its_owners_tables(store: Store, statement: str) -> None:
    """One plugin's forgotten braces must not become another plugin's lost table."""
    other, database = store.database("test.other"), store.database("test.notes")
    await other.migrate(NOTES)
    with pytest.raises(MigrationFailedError, match="touches"):
        await database.migrate(second(statement))
    assert await table_names(database) == {"llama_stack_migrations", other.name("notes"), database.name("notes")}


async def test_statements_for_postgresql_replace_the_others_there(store: Store) -> None:
    """Types and generated keys are spelled differently; the migration is still one."""
    database = store.database("test.blobs")
    await database.migrate(
        [
            Migration(
                number=1,
                description="bytes",
                statements=("CREATE TABLE {files} (body BLOB, made TEXT DEFAULT '12:30:00')",),
                postgresql=("CREATE TABLE {files} (body BYTEA, made TEXT DEFAULT '12:30:00'::text)",),
            )
        ]
    )
    async with database.write() as connection:
        await connection.execute(database.sql("INSERT INTO {files} (body) VALUES (:body)"), {"body": b"\0\xff"})
    async with database.read() as connection:
        (row,) = await connection.execute(database.sql("SELECT body, made FROM {files}"))
    assert (bytes(row.body), row.made) == (b"\0\xff", "12:30:00")


@pytest.mark.parametrize("numbers", [[2], [1, 3], [1, 1], [0, 1], [2, 1]])
async def test_numbers_with_a_gap_or_out_of_order_are_our_own_mistake(store: Store, numbers: list[int]) -> None:
    """Found at the first start in development, not at the first upgrade."""
    migrations = [Migration(number=number, description="x", statements=("SELECT 1",)) for number in numbers]
    with pytest.raises(ValueError, match="without gaps"):
        await store.database("test.notes").migrate(migrations)


@pytest.mark.parametrize(
    "statement", ["COMMIT", " begin", "ROLLBACK TO x", "PRAGMA user_version = 3", "vacuum", "SAVEPOINT x"]
)
def test_a_statement_that_leaves_the_transaction_is_refused(statement: str) -> None:
    """With a COMMIT in it, a migration would no longer be whole or absent."""
    with pytest.raises(ValueError, match="inside a migration's transaction"):
        Migration(number=1, description="x", statements=(statement,))


def test_a_migration_does_one_thing() -> None:
    """A lone string would be taken letter by letter; statements beside a function have no order."""

    async def run(connection: AsyncConnection, database: Database) -> None: ...

    with pytest.raises(TypeError, match="not one string"):
        Migration(number=1, description="x", statements="CREATE TABLE {a} (id INTEGER)")
    with pytest.raises(ValueError, match="either statements or a function"):
        Migration(number=1, description="x")
    with pytest.raises(ValueError, match="either statements or a function"):
        Migration(number=1, description="x", statements=("SELECT 1",), run=run)
