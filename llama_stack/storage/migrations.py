"""Numbered changes to one owner's tables, each applied once, whole or not at all.

What was applied is recorded in the core's table ``llama_stack_migrations``, in the transaction that applied it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias

from llama_stack.errors import MigrationChangedError, MigrationFailedError, StackError, StoreTooNewError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from llama_stack.storage.database import Database

    MigrationStep: TypeAlias = Callable[[AsyncConnection, Database], Awaitable[None]]

CORE_OWNER = "llama_stack"

# These would end or leave the transaction that makes a migration whole or absent.
_OUTSIDE = re.compile(
    r"\s*(BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE|START|PRAGMA|ATTACH|DETACH|VACUUM)\b", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One change: either ``statements``, or a function ``run`` for what SQL alone cannot do.

    Once released, a migration is never edited; a correction is a new one. ``{table}`` in a statement stands for the
    owner's full name of that table or index, as in ``Database.sql``.
    """

    number: int
    """1, 2, 3, ... without gaps."""
    description: str
    statements: Sequence[str] = ()
    """One SQL statement each."""
    postgresql: Sequence[str] | None = None
    """What to run on PostgreSQL instead, where its SQL differs."""
    run: MigrationStep | None = None
    """Called with a connection inside the migration's transaction and the database. Its code is not part of the
    checksum.
    """

    def __post_init__(self) -> None:
        for statements in (self.statements, self.postgresql or ()):
            if isinstance(statements, str):
                raise TypeError(f"migration {self.number}: statements is a sequence of strings, not one string")
            for statement in statements:
                if outside := _OUTSIDE.match(statement):
                    raise ValueError(
                        f"migration {self.number}: {outside[1]} cannot run inside a migration's transaction"
                    )
        if bool(self.statements) == (self.run is not None):
            raise ValueError(f"migration {self.number} needs either statements or a function")

    def statements_for(self, dialect: str) -> Sequence[str]:
        """The statements that a database of this dialect runs."""
        return self.postgresql if dialect == "postgresql" and self.postgresql is not None else self.statements

    def checksum(self, dialect: str) -> str:
        """A hash of what the migration does; the layout of its SQL (runs of white space) does not count."""
        parts = [" ".join(statement.split()) for statement in self.statements_for(dialect)]
        return hashlib.sha256("\0".join([str(self.number), *parts]).encode()).hexdigest()


CORE_MIGRATIONS = (
    Migration(
        number=1,
        description="the record of applied migrations",
        statements=(
            "CREATE TABLE llama_stack_migrations ("
            " owner TEXT NOT NULL, number INTEGER NOT NULL, description TEXT NOT NULL, checksum TEXT NOT NULL,"
            " applied_at TEXT NOT NULL, PRIMARY KEY (owner, number))",
        ),
    ),
)


async def migrate(database: Database, migrations: Sequence[Migration]) -> None:
    """Apply what is missing of ``migrations``. See ``Database.migrate``."""
    numbers = [migration.number for migration in migrations]
    if numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"migrations of {database.owner!r} are numbered {numbers}; expected 1, 2, 3, ... without gaps")
    async with database.read() as connection:
        missing = _missing(database, migrations, await _recorded(connection, database.owner))
    for migration in missing:
        async with database.write() as connection:
            # Read again under the write lock: another process may have applied it since.
            if migration in _missing(database, migrations, await _recorded(connection, database.owner)):
                await _apply(connection, database, migration)


def _missing(database: Database, migrations: Sequence[Migration], recorded: dict[int, str]) -> list[Migration]:
    if recorded and max(recorded) > len(migrations):
        raise StoreTooNewError(database.owner, found=max(recorded), known=len(migrations))
    missing = []
    for migration in migrations:
        checksum = recorded.get(migration.number)
        if checksum is None:
            missing.append(migration)
        elif checksum != migration.checksum(database.dialect):
            raise MigrationChangedError(database.owner, migration.number, migration.description)
    return missing


async def _recorded(connection: AsyncConnection, owner: str) -> dict[int, str]:
    """The checksum of each migration of ``owner`` that the store has."""
    from sqlalchemy import inspect, text

    if not await connection.run_sync(lambda sync: inspect(sync).has_table("llama_stack_migrations")):
        return {}
    rows = await connection.execute(
        text("SELECT number, checksum FROM llama_stack_migrations WHERE owner = :owner"), {"owner": owner}
    )
    return {row.number: row.checksum for row in rows}


async def _apply(connection: AsyncConnection, database: Database, migration: Migration) -> None:
    from sqlalchemy import text
    from sqlalchemy.exc import SQLAlchemyError

    before = await _tables(connection)
    try:
        if migration.run is not None:
            await migration.run(connection, database)
        for statement in migration.statements_for(database.dialect):
            # Not text(): a colon in a cast or a time is no parameter here.
            await connection.exec_driver_sql(database.expand(statement))
    except StackError:
        raise
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error)
        raise MigrationFailedError(database.owner, migration.number, migration.description, cause) from error
    except Exception as error:
        raise MigrationFailedError(database.owner, migration.number, migration.description, repr(error)) from error
    if database.owner != CORE_OWNER:
        foreign = sorted({name for name, _ in before ^ await _tables(connection) if not database.owns(name)})
        if foreign:
            raise MigrationFailedError(
                database.owner,
                migration.number,
                migration.description,
                f"it touches {', '.join(foreign)}, and this owner's tables are named in braces: {{chunks}}",
            )
    await connection.execute(
        text("INSERT INTO llama_stack_migrations VALUES (:owner, :number, :description, :checksum, :applied_at)"),
        {
            "owner": database.owner,
            "number": migration.number,
            "description": migration.description,
            "checksum": migration.checksum(database.dialect),
            "applied_at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


async def _tables(connection: AsyncConnection) -> set[tuple[str, str]]:
    """Every table and view with something that changes when it is altered; on SQLite its indexes and triggers too."""
    if connection.dialect.name == "sqlite":
        sql = "SELECT tbl_name AS name, type || ' ' || name || ' ' || coalesce(sql, '') AS shape FROM sqlite_master"
    else:
        sql = (
            "SELECT c.relname::text AS name, c.oid || ' ' ||"
            " coalesce(string_agg(a.attname || ' ' || a.atttypid, ',' ORDER BY a.attnum), '') AS shape"
            " FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0"
            " WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')"
            " GROUP BY c.relname, c.oid"
        )
    rows = await connection.exec_driver_sql(sql)
    return {(row.name, row.shape) for row in rows}
