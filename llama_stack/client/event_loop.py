"""An event loop in a thread of its own, for code that is not async and wants what is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


class EventLoopThread:
    """Runs coroutines on a loop of its own, for any number of threads at once, until it is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llama-stack client", daemon=True)
        self._thread.start()
        self._closing = threading.Lock()  # what began before ``close`` is cancelled, and nothing begins after it
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the coroutine and return its result. Whatever interrupts the wait (Ctrl-C) cancels the coroutine.

        Raises ``RuntimeError`` when the thread is closed, also while the coroutine runs.
        """
        with self._closing:
            if self._is_closed:
                coroutine.close()
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError as error:  # which is the end of nothing but ``close``
            raise RuntimeError("the client was closed meanwhile") from error
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the loop call the function, without waiting; nothing happens when the thread is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel what still runs, then end the thread; a second call does nothing."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(_end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@runtime_checkable
class Closeable(Protocol):
    """An async iterator that can be told to stop."""

    async def aclose(self) -> None: ...


async def close(items: AsyncIterator[T]) -> None:
    """Stop an iterator and the work behind it, where it has a way to be stopped."""
    if isinstance(items, Closeable):
        await items.aclose()


class Pump(Generic[T]):
    """Steps an async iterator, on demand, always in the same task: a provider may hold a timeout across its yields."""

    def __init__(self, thread: EventLoopThread, items: AsyncIterator[T]) -> None:
        self._thread = thread
        self._items = items
        self._wanted: asyncio.Queue[asyncio.Future[T]] = asyncio.Queue()
        self._task = thread.run(_started(items, self._wanted))
        self._is_over = False

    def next(self) -> T:
        """The next item. Raises ``StopAsyncIteration`` at the end and ever after, and what the iterator raises."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            return self._thread.run(self._next())
        except BaseException:
            self.abandon()
            raise

    def close(self) -> None:
        """Stop the iterator and wait until it is closed."""
        self._is_over = True
        if not self._thread.is_closed:
            self._thread.run(_ended(self._task, self._items))

    def abandon(self) -> None:
        """Stop the iterator without waiting."""
        self._is_over = True
        self._thread.call_soon(self._task.cancel)

    async def _next(self) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._wanted.put_nowait(answer)
        either: list[asyncio.Future[Any]] = [answer, self._task]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if not self._is_over:  # else the caller has closed the stream, and it may end
            self._task.result()
        raise StopAsyncIteration


async def _step(items: AsyncIterator[T], wanted: asyncio.Queue[asyncio.Future[T]]) -> None:
    try:
        while True:
            answer = await wanted.get()
            async for item in items:
                if not answer.done():
                    answer.set_result(item)
                break
            else:
                return
    finally:
        await close(items)


async def _started(items: AsyncIterator[T], wanted: asyncio.Queue[asyncio.Future[T]]) -> asyncio.Task[None]:
    return asyncio.create_task(_step(items, wanted))


async def _ended(task: asyncio.Task[None], items: AsyncIterator[T]) -> None:
    task.cancel()
    await asyncio.wait([task])
    await close(items)  # a task that never ran has closed nothing


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
