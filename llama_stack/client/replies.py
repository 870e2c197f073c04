"""Replies that come whole or as a stream: the stream itself, and two words that say which of the two is meant."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

from pydantic import BaseModel

from .event_loop import Pump, close

T = TypeVar("T")
S = TypeVar("S", bound=BaseModel)
C = TypeVar("C", bound=BaseModel)


class Stream(AsyncIterator[T], Generic[T]):
    """Items as they arrive. Closing it, or leaving its ``async with`` block, stops the work behind it.

    A stream that is dropped unread is closed by the event loop.
    """

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._items = items

    async def __anext__(self) -> T:
        return await anext(self._items)

    async def aclose(self) -> None:
        """Stop the stream and the work behind it; a second call does nothing."""
        await close(self._items)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class BlockingStream(Iterator[T], Generic[T]):
    """Items as they arrive, for code that is not async. Closing it, or leaving its ``with`` block, stops the work."""

    def __init__(self, pump: Pump[T]) -> None:
        self._pump = pump

    def __next__(self) -> T:
        try:
            return self._pump.next()
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """Stop the stream and the work behind it; a second call does nothing."""
        self._pump.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._pump.abandon()


def whole(reply: S | AsyncIterator[Any] | Iterator[Any]) -> S:
    """The reply to a request that asked for no stream. Raises ``TypeError`` when it is a stream."""
    if isinstance(reply, AsyncIterator | Iterator):
        raise TypeError("the reply is a stream; read it with chunks(), or ask with stream=False")
    return reply


# mypy sees that a reply that is certainly whole fits both forms; at run time that is the TypeError.
@overload
def chunks(reply: S | AsyncIterator[C]) -> Stream[C]: ...  # type: ignore[overload-overlap]
@overload
def chunks(reply: S | Iterator[C]) -> BlockingStream[C]: ...
def chunks(reply: object) -> object:
    """The stream that answers a request that asked for one. Raises ``TypeError`` when the reply is whole."""
    if isinstance(reply, Stream | BlockingStream):
        return reply
    if isinstance(reply, AsyncIterator):
        return Stream(reply)
    raise TypeError("the reply is whole, not a stream; ask with stream=True")
