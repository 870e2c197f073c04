"""PostgreSQL as the store: shared by any number of processes and machines."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, Never

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

from llama_stack.errors import (
    StackError,
    StorageFullError,
    StoreBusyError,
    StoreError,
    StoreUnavailableError,
)
from llama_stack.storage.cancellation import to_the_end
from llama_stack.storage.database import Health
from llama_stack.storage.transactions import Turns, transaction

try:
    import asyncpg  # type: ignore[import-untyped]  # it ships no types
except ImportError as error:
    raise StoreError(
        "PostgreSQL needs the package asyncpg; install it with: pip install 'llama-stack[postgresql]'"
    ) from error

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncConnection

CONNECTIONS = 10
"""Connections that one process opens at most."""

CONNECT_TIMEOUT_SECONDS = 10.0

RECONNECT_SECONDS = 2.0
"""How often a server that was lost is looked for: with readiness at 503 no request comes to find it."""

# PostgreSQL error codes, appendix A of its manual. Two characters are a class.
_DISK_FULL = "53100"
_WAITED_TOO_LONG = ("55P03", "40001", "40P01")
_NOT_NOW = ("08", "53", "57P", "58")
_READ_ONLY = "25006"  # in a write block: the server has become a standby


class PostgresqlConnections:
    """Connections to one PostgreSQL database.

    The server's own rule for a failed sync is ours: it stops at once and recovers from its log, so nothing is marked
    failed here; until it is back, every block raises ``StoreUnavailableError``.
    """

    dialect: Literal["sqlite", "postgresql"] = "postgresql"

    def __init__(self, url: str, location: str, health: Health, *, busy_timeout_seconds: float) -> None:
        self._url = url
        self._location = location
        self._health = health
        self._turns = Turns(busy_timeout_seconds)
        self._busy_timeout_seconds = busy_timeout_seconds
        self._search: asyncio.Task[None] | None = None
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._connect,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=busy_timeout_seconds,
            pool_pre_ping=True,
        )
        # A snapshot that holds for the block, as on SQLite.
        self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        event.listen(self._engine.sync_engine, "handle_error", self._explain)

    async def prepare(self) -> None:
        """Reach the server once. Raises ``StoreUnavailableError``, which tells the operator where and why."""
        try:
            await self._reach()
        except StoreUnavailableError as error:
            cause = error.__cause__ or error
            raise StoreUnavailableError(
                f"{self._location} cannot be reached: {cause or type(cause).__name__}"
            ) from error

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """See ``Database.read``."""
        async with transaction(self._reader) as connection:
            yield connection
            self._health.reachable = True

    async def read_at_once(self, work: object) -> Never:
        """There is no such thing here."""
        raise RuntimeError("read_at_once is SQLite's, and the database is PostgreSQL: use read")

    @asynccontextmanager
    async def writing(self, owner: str, *, frees_space: bool) -> AsyncIterator[AsyncConnection]:
        """See ``Database.write``. ``frees_space`` changes nothing: the server keeps room for its own log."""
        async with self._turns.take(owner), transaction(self._engine) as connection:
            # One writer an owner across processes too: what is right on SQLite, which has one writer, is right here.
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _lock_key(owner)})
            yield connection
            sync_connection = connection.sync_connection
            assert sync_connection is not None
            if sync_connection.info.pop("statement_failed", False):
                # After a failed statement the server answers COMMIT by rolling back, without an error. Any statement
                # raises, unless the failure was undone by a savepoint.
                await connection.exec_driver_sql("SELECT 1")
            await to_the_end(connection.commit())
            self._health.reachable = True

    async def close(self) -> None:
        """Close every connection."""
        if self._search is not None:
            self._search.cancel()
            await asyncio.wait([self._search])
        await self._engine.dispose()

    async def _reach(self) -> None:
        async with self.reading() as connection:
            await connection.exec_driver_sql("SELECT 1")

    def _lose(self) -> None:
        """Note that the server cannot be reached, and look for it until it is back."""
        self._health.reachable = False
        if self._search is None or self._search.done():
            self._search = asyncio.create_task(self._look(), name="look for the database server")

    async def _look(self) -> None:
        while not self._health.reachable:
            await asyncio.sleep(RECONNECT_SECONDS)
            with suppress(StackError):
                await self._reach()

    async def _connect(self) -> Any:
        try:
            connection = await asyncpg.connect(
                self._url,
                timeout=CONNECT_TIMEOUT_SECONDS,
                server_settings={
                    "application_name": "llama-stack",
                    "synchronous_commit": "on",  # even where the server's default acknowledges what it may lose
                    "lock_timeout": str(int(self._busy_timeout_seconds * 1000)),
                },
            )
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            self._lose()
            # Without the cause, which names hosts: a client may see this.
            raise StoreUnavailableError("the database server cannot be reached") from error
        return connection

    def _explain(self, context: ExceptionContext) -> StackError | None:
        """Our error for what the server reported, or None when it is the statement's own fault."""
        if not isinstance(context.original_exception, Exception):
            return None  # a cancellation, which stays one
        state = getattr(context.original_exception, "sqlstate", None) or ""
        connection: Connection | None = context.connection
        if connection is not None and not connection.invalidated:
            connection.info["statement_failed"] = True
        if state == _DISK_FULL:
            return StorageFullError("the database server has no room left; nothing was applied")
        if state in _WAITED_TOO_LONG:
            return StoreBusyError("other writes held the store for too long")
        is_standby = state == _READ_ONLY and not (
            connection is not None and connection.get_execution_options().get("postgresql_readonly")
        )
        if context.is_disconnect or is_standby or state.startswith(_NOT_NOW):
            self._lose()
            return StoreUnavailableError(
                "the database broke off; if it was committing, the change may be applied or not"
            )
        return None


def _lock_key(owner: str) -> int:
    """A signed 64-bit number for the owner, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"llama-stack/{owner}".encode()).digest()[:8], signed=True)
