"""What a provider gets as its database: its own tables in the store that all providers share.

``Database`` scopes names and migrations to one owner. How a connection is opened, and what a driver's error means, is
left to ``sqlite.py`` and ``postgresql.py``; which of the two it is, to ``store.py``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from llama_stack.errors import StoreFailedError
from llama_stack.storage.migrations import Migration, migrate

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")

BUSY_TIMEOUT_SECONDS = 30.0
"""How long a block waits for its turn to write, or for a free connection, before it is refused with 503."""

MAX_TABLE_CHARS = 30
MAX_IDENTIFIER_CHARS = 31
"""With the table's name and two underscores 63, the length beyond which PostgreSQL would cut a name short."""

_OWNER = re.compile(r"[a-z][a-z0-9_./-]*")
_PLAIN = re.compile(r"[a-z][a-z0-9]*([_./-][a-z0-9]+)*")
_TABLE = re.compile(r"[a-z][a-z0-9_]*")
_PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")


def owner_identifier(owner: str) -> str:
    """``owner`` as it begins the names of its tables and names its blob folder.

    One that is long, or has separators in a row or at its end, is shortened and ends in a hash of the whole.

    Raises ``ValueError`` unless ``owner`` is a lower-case letter, followed by such letters, digits and ``- _ . /``.
    """
    if not _OWNER.fullmatch(owner):
        raise ValueError(f"owner {owner!r} is not lower-case letters, digits, '-', '_', '.' and '/' after a letter")
    identifier = re.sub(r"[_./-]+", "_", owner)
    if identifier.partition("_")[0] in ("sqlite", "pg"):
        raise ValueError(f"owner {owner!r} begins as the database's own tables do; put another word before it")
    if len(identifier) > MAX_IDENTIFIER_CHARS or not _PLAIN.fullmatch(owner):
        digest = hashlib.sha256(owner.encode()).hexdigest()[:8]
        identifier = f"{identifier[: MAX_IDENTIFIER_CHARS - 9].rstrip('_')}_{digest}"
    return identifier


class Health:
    """Whether the store can still be trusted with writes; one object for all owners of a store.

    ``on_failure`` is called once, with the reason, when it can no longer.
    """

    def __init__(self, on_failure: Callable[[str], object] | None = None) -> None:
        self._on_failure = on_failure
        self.fault: str | None = None
        """Why no write is taken any more, or None."""
        self.reachable = True
        """Whether the last attempt to reach the database server succeeded; always true for SQLite."""

    @property
    def healthy(self) -> bool:
        """Whether writes are taken and the database was last seen reachable."""
        return self.fault is None and self.reachable

    def fail(self, reason: str) -> StoreFailedError:
        """Stop taking writes for the life of this process; the first reason stays. Returns the error to raise.

        A failed sync leaves it unknown which pages reached the disk, and the kernel reports it once: the next commit
        would succeed and vouch for what is lost (SQLite does exactly that; PostgreSQL panics instead). Only a restart,
        which reads back what the disk really holds, can tell.
        """
        if self.fault is None:
            self.fault = reason
            if self._on_failure is not None:
                self._on_failure(reason)
        return StoreFailedError(reason)

    def require_writable(self) -> None:
        """Raise ``StoreFailedError`` once the store has failed."""
        if self.fault is not None:
            raise StoreFailedError(self.fault)


class Connections(Protocol):
    """How one kind of database gives its connections."""

    dialect: Literal["sqlite", "postgresql"]

    async def prepare(self) -> None:
        """Reach the database, and refuse one that is not ours. Called once, before anything else."""

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A connection inside a read-only transaction."""

    async def read_at_once(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """See ``Database.read_at_once``."""

    def writing(self, owner: str, *, frees_space: bool) -> AbstractAsyncContextManager[AsyncConnection]:
        """A connection inside a transaction that is committed, durably, when the block ends without an exception."""

    async def close(self) -> None:
        """Close every connection."""


class Database:
    """The tables of one owner.

    A provider asks for it by annotation (``database: Database``), brings its tables up to date with ``migrate`` before
    it yields, and from then on opens a ``read`` or a ``write`` block for each request. SQL names the owner's tables in
    braces, so it stays a constant::

        async with database.write() as connection:
            await connection.execute(
                database.sql("INSERT INTO {chunks} (id, body) VALUES (:id, :body)"), {"id": id, "body": body}
            )
    """

    def __init__(self, owner: str, connections: Connections, health: Health) -> None:
        self.owner = owner
        self._prefix = owner_identifier(owner) + "__"
        self._connections = connections
        self._health = health
        self._texts: dict[str, TextClause] = {}

    @property
    def dialect(self) -> Literal["sqlite", "postgresql"]:
        """Which SQL the database speaks."""
        return self._connections.dialect

    @property
    def healthy(self) -> bool:
        """Whether writes are taken; false for good after one that could not be made durable."""
        return self._health.healthy

    def name(self, table: str) -> str:
        """The full name of this owner's table or index ``table``, for SQLAlchemy's ``Table`` and the like.

        Raises ``ValueError`` for anything but lower-case letters, digits and underscores, at most 30. A table's name is
        a constant of the code, never something that a client sent.
        """
        if not _TABLE.fullmatch(table) or len(table) > MAX_TABLE_CHARS:
            raise ValueError(
                f"table name {table!r} is not lower-case letters, digits and underscores, {MAX_TABLE_CHARS} at most"
            )
        return self._prefix + table

    def owns(self, name: str) -> bool:
        """Whether a table of this full name belongs to this owner."""
        return name.startswith(self._prefix)

    def expand(self, sql: str) -> str:
        """``sql`` with each ``{table}`` replaced by its full name; any other brace stays as it is."""
        return _PLACE.sub(lambda place: self.name(place[1]), sql)

    def sql(self, sql: str) -> TextClause:
        """A statement for ``execute``, with ``{table}`` as in ``expand`` and each value bound as ``:name``."""
        statement = self._texts.get(sql)
        if statement is None:
            from sqlalchemy import text

            statement = self._texts[sql] = text(self.expand(sql))
        return statement

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A connection that sees one unchanging state of the store for the length of the block, and cannot write.

        Reads never wait for writers. Raises ``StoreUnavailableError`` when the database cannot be reached and
        ``StoreBusyError`` when no connection becomes free in 30 s.
        """
        return self._connections.reading()

    async def read_at_once(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What ``work`` returns, which is called in a thread with a connection of Python's ``sqlite3``.

        It reads as in a ``read`` block, and the whole of it costs one way to a thread and back, where there each
        statement costs several: for what must answer within a millisecond. A cancellation waits for the end of
        ``work``. SQL gets its tables' names from ``expand``.

        Raises ``StoreUnavailableError`` as ``read`` does, and ``RuntimeError`` where the database is not SQLite.
        """
        return await self._connections.read_at_once(work)

    @asynccontextmanager
    async def write(self, *, frees_space: bool = False) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction of its own: all of the block is applied, or nothing.

        When the block has ended without an exception, its changes are on disk (SQLite: synced; PostgreSQL: committed
        with ``synchronous_commit``). An exception, or a cancellation inside the block, undoes it; a cancellation
        during the commit waits for the commit. One owner writes one block at a time, also across processes, so that
        what a block has read stays true until it ends; keep blocks short.

        ``frees_space`` marks a block that only removes: on a full disk it may use the room that the store keeps for
        that.

        Raises ``StorageFullError`` (nothing applied), ``StoreFailedError`` (no write is taken until a restart),
        ``StoreBusyError``, ``StoreUnavailableError``; constraint violations come as ``sqlalchemy.exc.IntegrityError``.
        """
        self._health.require_writable()
        async with self._connections.writing(self.owner, frees_space=frees_space) as connection:
            yield connection

    async def migrate(self, migrations: Sequence[Migration]) -> None:
        """Bring this owner's tables up to the last of ``migrations``, one transaction each.

        Raises ``StoreTooNewError`` before anything is written when the store has migrations that this code does not
        know, ``MigrationChangedError`` when one that was applied reads differently now, and ``MigrationFailedError``
        when one cannot be applied; those before it stay applied. Any number of processes may do this at once.
        """
        await migrate(self, migrations)
