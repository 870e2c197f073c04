"""Work that must not be abandoned half-way: a commit, a rollback, a thread that still writes to our file."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Executor

P = ParamSpec("P")
T = TypeVar("T")

# asyncio and anyio are imported in the functions: listing what is installed imports this package and runs no loop.


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end even when the caller is cancelled; the cancellation is raised again after it.

    The caller gets the result of ``work``, or its exception, unless it was cancelled meanwhile.
    """
    import asyncio

    import anyio

    task = asyncio.create_task(work)
    cancellation: asyncio.CancelledError | None = None
    # A cancelled anyio scope cancels again at every await; the shield keeps that from turning this loop into a spin.
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                cancellation = error
    if cancellation is not None:
        if not task.cancelled():
            task.exception()  # marked as seen: the cancellation is what the caller gets
        raise cancellation
    return task.result()


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking ``work`` off the event loop, and to its end as ``to_the_end`` does."""
    return await in_executor(None, work, *args, **kwargs)


async def in_executor(executor: Executor | None, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As ``in_thread``, in a thread of ``executor``; ``None`` is the loop's own."""
    import asyncio
    import contextvars

    call = partial(contextvars.copy_context().run, work, *args, **kwargs)
    future = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(future)  # a task, as ``to_the_end`` makes one, would double what the hop costs
    except asyncio.CancelledError:
        await to_the_end(_ended(future))
        raise


async def _ended(future: asyncio.Future[Any]) -> None:
    import asyncio

    await asyncio.wait({future})
    if not future.cancelled():
        future.exception()  # marked as seen, as in ``to_the_end``
