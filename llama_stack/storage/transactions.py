"""Taking turns to write, and one transaction on one pooled connection that is given back whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from llama_stack.errors import StoreBusyError
from llama_stack.storage.cancellation import to_the_end

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


class Turns:
    """One writer at a time for each key, in the order of asking, with a bound on the wait."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._locks: dict[str, asyncio.Lock] = {}
        self._writing: set[asyncio.Task[object] | None] = set()

    @asynccontextmanager
    async def take(self, key: str) -> AsyncIterator[None]:
        """Hold the turn for ``key``. Raises ``StoreBusyError`` when it does not come in time."""
        task = asyncio.current_task()
        if task in self._writing:
            raise RuntimeError("a write block inside a write block of the same task would wait for itself")
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await lock.acquire()
        except TimeoutError:
            raise StoreBusyError(f"other writes held the store for {self._timeout_seconds:g} s") from None
        self._writing.add(task)
        try:
            yield
        finally:
            self._writing.discard(task)
            lock.release()


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection in a new transaction, which is rolled back unless the block has committed it.

    Raises ``StoreBusyError`` when every connection of the pool stays in use.
    """
    connection = engine.connect()
    try:
        await connection.start()
    except PoolTimeoutError:
        raise StoreBusyError("every connection to the store stayed in use") from None
    try:
        await connection.begin()
        yield connection
    finally:
        await to_the_end(connection.close())
