"""SQLite as the store: one file, one writer at a time, readers that never wait."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from llama_stack.errors import (
    StackError,
    StorageFullError,
    StoreBusyError,
    StoreError,
    StoreTooNewError,
    StoreUnavailableError,
)
from llama_stack.storage.cancellation import in_executor, in_thread, to_the_end
from llama_stack.storage.database import Health
from llama_stack.storage.files import sync_folder
from llama_stack.storage.migrations import CORE_MIGRATIONS, CORE_OWNER
from llama_stack.storage.transactions import Turns, transaction

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

T = TypeVar("T")

READERS = 8
"""Connections for reading, and as many for ``read_at_once``; each is a thread, opened when it is first needed."""

ALWAYS = ["PRAGMA foreign_keys = ON", "PRAGMA trusted_schema = OFF"]
READING = [*ALWAYS, "PRAGMA query_only = ON"]
"""What a connection is told when it is opened."""

BALLAST_BYTES = 4 * 1024 * 1024
"""Kept beside the file and given up on a full disk, where otherwise even DELETE fails: its log needs room first."""

WAL_LIMIT_BYTES = 64 * 1024 * 1024
"""What the log file shrinks back to after a large transaction."""


class SqliteConnections:
    """Connections to one SQLite file in WAL mode.

    With ``durable`` a commit is synced to the disk before it returns (``synchronous=FULL``); without, only a store
    that is thrown away at its end is meant.
    """

    dialect: Literal["sqlite", "postgresql"] = "sqlite"

    def __init__(self, path: Path, health: Health, *, busy_timeout_seconds: float, durable: bool) -> None:
        self._path = path
        self._health = health
        self._ballast = path.with_name(path.name + ".ballast")
        self._durable = durable
        self._busy_timeout_seconds = busy_timeout_seconds
        self._turns = Turns(busy_timeout_seconds)
        self._writer = self._engine(busy_timeout_seconds, connections=1, is_writer=True)
        self._reader = self._engine(busy_timeout_seconds, connections=READERS, is_writer=False)
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store")
        self._of_thread = threading.local()
        self._opened: list[sqlite3.Connection] = []
        """The connections of those threads."""

    async def prepare(self) -> None:
        """Make the file if there is none. Raises ``StoreError`` and ``StoreTooNewError``, with the file untouched."""
        await in_thread(self._make_or_check)

    def _make_or_check(self) -> None:
        try:
            if self._path.exists():
                self._refuse_foreign()
            else:
                # Made here and not by SQLite, which would take the umask; the log files inherit the mode.
                os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
                sync_folder(self._path.parent)
        except sqlite3.Error as error:
            raise StoreError(f"{self._path} cannot be read as an SQLite store: {error}") from error
        except OSError as error:
            raise StoreError(f"{self._path} cannot be opened: {error.strerror}") from error
        if self._durable:
            self._fill_ballast()

    def _refuse_foreign(self) -> None:
        # Without a log there is nothing but the file, and "immutable" reads it without making the two files beside it.
        log = self._path.with_name(self._path.name + "-wal")
        file = sqlite3.connect(f"{self._path.as_uri()}?mode=ro{'' if log.exists() else '&immutable=1'}", uri=True)
        try:
            tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "llama_stack_migrations" in tables:
                (found,) = file.execute(
                    "SELECT max(number) FROM llama_stack_migrations WHERE owner = ?", (CORE_OWNER,)
                ).fetchone()
                if (found or 0) > len(CORE_MIGRATIONS):
                    raise StoreTooNewError(CORE_OWNER, found=found, known=len(CORE_MIGRATIONS))
            elif tables:
                raise StoreError(
                    f"{self._path} is an SQLite file of another program; name a file of its own for the store"
                )
        finally:
            file.close()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """See ``Database.read``."""
        async with transaction(self._reader) as connection:
            yield connection

    async def read_at_once(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """See ``Database.read_at_once``."""
        return await in_executor(self._threads, self._read, work)

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection: sqlite3.Connection | None = getattr(self._of_thread, "connection", None)
            if connection is None:
                connection = self._of_thread.connection = self._open_reader()
            connection.execute("BEGIN")
            try:
                return work(connection)
            finally:
                connection.rollback()
        except sqlite3.Error as error:
            explained = self._explained(error, is_writer=False)
            if explained is None:
                raise
            raise explained from error

    def _open_reader(self) -> sqlite3.Connection:
        # Not only its own thread may close it.
        connection = sqlite3.connect(
            self._path, timeout=self._busy_timeout_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            for pragma in READING:
                connection.execute(pragma)
        except BaseException:
            connection.close()
            raise
        self._opened.append(connection)
        return connection

    @asynccontextmanager
    async def writing(self, owner: str, *, frees_space: bool) -> AsyncIterator[AsyncConnection]:
        """See ``Database.write``. SQLite has one writer for the whole file, whoever the owner is."""
        async with self._turns.take("the file"):
            self._health.require_writable()
            uses_ballast = frees_space and self._durable and _free_bytes(self._path) < BALLAST_BYTES
            if uses_ballast:
                self._ballast.unlink(missing_ok=True)
                await self._empty_log()
            async with transaction(self._writer) as connection:
                yield connection
                self._health.require_writable()  # a reader may have found the file damaged meanwhile
                await to_the_end(connection.commit())
            if uses_ballast:
                await self._empty_log()
            if frees_space and self._durable:
                await in_thread(self._fill_ballast)

    async def close(self) -> None:
        """Close every connection; the last one moves the log into the file."""
        await in_thread(self._threads.shutdown)
        for connection in self._opened:
            connection.close()
        await self._reader.dispose()
        await self._writer.dispose()

    async def _empty_log(self) -> None:
        """Move the log into the file, so that the next transaction starts it anew instead of growing it."""
        async with self._writer.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            with suppress(sqlite3.Error):  # what cannot be moved now stays in the log, which is as good
                await to_the_end(driver.execute_fetchall("PRAGMA wal_checkpoint(PASSIVE)"))

    def _fill_ballast(self) -> None:
        with suppress(OSError):  # no room for it now: the next removal tries again
            descriptor = os.open(self._ballast, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                # Noise, because some file systems keep no room for zeros.
                if size != BALLAST_BYTES and os.write(descriptor, os.urandom(BALLAST_BYTES)) != BALLAST_BYTES:
                    self._ballast.unlink()
            except OSError:
                self._ballast.unlink()
            finally:
                os.close(descriptor)

    def _engine(self, busy_timeout_seconds: float, *, connections: int, is_writer: bool) -> AsyncEngine:
        engine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(self._path)),
            # SQLAlchemy's begin event starts each transaction; the driver must not start its own.
            connect_args={"isolation_level": None, "timeout": busy_timeout_seconds},
            poolclass=AsyncAdaptedQueuePool,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=busy_timeout_seconds,
        )
        pragmas = READING
        if is_writer:
            pragmas = [
                *ALWAYS,
                "PRAGMA journal_mode = WAL",
                f"PRAGMA synchronous = {'FULL' if self._durable else 'OFF'}",
                "PRAGMA fullfsync = ON",
                f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}",
            ]

        @event.listens_for(engine.sync_engine, "connect")
        def configure(connection: Any, record: object) -> None:
            cursor = connection.cursor()
            for pragma in pragmas:
                cursor.execute(pragma)
            if is_writer:
                cursor.execute("PRAGMA journal_mode")
                (mode,) = cursor.fetchone()
                if mode != "wal":
                    raise StoreError(
                        f"{self._path} lies on a file system without the shared memory that SQLite's WAL needs"
                    )
            cursor.close()

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")

        @event.listens_for(engine.sync_engine, "handle_error")
        def explain(context: ExceptionContext) -> StackError | None:
            return self._explained(context.original_exception, is_writer=is_writer)

        return engine

    def _explained(self, error: BaseException, *, is_writer: bool) -> StackError | None:
        """Our error for what SQLite reported, or None when it is the statement's own fault.

        Result codes: https://www.sqlite.org/rescode.html
        """
        code = getattr(error, "sqlite_errorcode", None)
        if not isinstance(error, sqlite3.Error) or code is None:
            return None
        # Growing the shared-memory index is reported as an I/O error on a full disk.
        if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE:
            return StorageFullError(
                "the store has no room left; nothing was applied. Delete something or enlarge the disk"
            )
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusyError("another process held the store for too long")
        if code == sqlite3.SQLITE_READONLY and not is_writer:
            return None
        if code & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            return StoreUnavailableError(f"the store cannot be written now: {error}")
        if code in (sqlite3.SQLITE_IOERR_NOMEM, sqlite3.SQLITE_CORRUPT_VTAB):
            return None
        if code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._health.fail(f"the disk under the store failed ({error}, {error.sqlite_errorname})")
        return None


def _free_bytes(path: Path) -> int:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize
