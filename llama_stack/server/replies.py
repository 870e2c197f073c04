"""How an operation's success looks on the wire: nothing, one JSON value, lines, or events.

The first item of a stream is taken before the status is sent, so that an early error keeps its status. After that a
failure is a typed event and a clean end; of lines, which have no room for an error, it is a cut connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from enum import Enum
from functools import lru_cache
from time import perf_counter
from typing import Any, Final

from pydantic import TypeAdapter

from ..apis.contract import Operation, Shape
from .errors import Headers, problem_bytes
from .exchange import ClientGoneError, Exchange
from .traffic import note_failure


class Form(Enum):
    """A form in which several values travel: its media type, and what stands before, between and after them."""

    EVENTS = (b"text/event-stream", b"", b"data: ", b"data: ", b"\n\n", b"")
    LINES = (b"application/jsonl", b"", b"", b"", b"\n", b"")
    ARRAY = (b"application/json", b"[", b"", b",", b"", b"]")

    def __init__(self, media_type: bytes, opening: bytes, first: bytes, next_: bytes, after: bytes, closing: bytes):
        self.headers: Headers = [(b"content-type", media_type)]
        self.opening = opening
        self.first = first
        self.next = next_
        self.after = after
        self.closing = closing


TURN_SECONDS = 0.01
"""How long one stream may go on without giving way to others."""
JSON: Final[Headers] = [(b"content-type", b"application/json")]
VOID: Final[Headers] = []
_END: Final = object()


@lru_cache(maxsize=256)
def accepted(header: bytes) -> frozenset[str]:
    """The media types that an Accept header names with any weight above zero; parameters are left out."""
    found = set()
    for part in header.decode("latin-1").lower().split(","):
        media_type, *parameters = (piece.strip() for piece in part.split(";"))
        if not any(p.startswith("q=") and not p[2:].strip("0.") for p in parameters):
            found.add(media_type)
    return frozenset(found)


def lines_form(exchange: Exchange) -> Form:
    """Lines, or an array for a client that accepts JSON and names nothing that lines would be (spec rule G6)."""
    header = exchange.headers.get(b"accept")
    if header is None:
        return Form.LINES
    types = accepted(header)
    lines = {"application/jsonl", "application/x-ndjson", "application/*", "*/*"}
    return Form.ARRAY if "application/json" in types and not types & lines else Form.LINES


def chunks_form(exchange: Exchange) -> Form:
    """Events, or lines for a client that asks for those (spec rule G7)."""
    header = exchange.headers.get(b"accept")
    if header is None:
        return Form.EVENTS
    types = accepted(header)
    wants_lines = types & {"application/jsonl", "application/x-ndjson"} and "text/event-stream" not in types
    return Form.LINES if wants_lines else Form.EVENTS


async def reply(exchange: Exchange, operation: Operation, result: Any) -> None:
    """Send what the provider returned for this operation.

    Raises ``TypeError`` where it is not of the operation's shape, and whatever the provider's iterator raises before
    its first item.
    """
    if operation.shape is Shape.VOID:
        if result is not None:
            raise TypeError(f"{operation.key} answers with nothing, and its provider returned a value")
        await exchange.answer(200, VOID, b"")
    elif operation.shape is Shape.LINES:
        await _stream(exchange, operation.result_adapter, _iterator(operation, result), lines_form(exchange), False)
    elif hasattr(result, "__aiter__"):
        await _stream(exchange, operation.chunk_adapter, _iterator(operation, result), chunks_form(exchange), True)
    else:
        await exchange.answer(200, JSON, dumped(operation.result_adapter, result))


def dumped(adapter: TypeAdapter[Any], value: Any) -> bytes:
    """The value as compact JSON without absent fields. Raises when it is not of the adapter's type."""
    return adapter.dump_json(value, exclude_none=True, warnings="error")


def _iterator(operation: Operation, result: Any) -> AsyncIterator[Any]:
    if not hasattr(result, "__aiter__"):
        raise TypeError(
            f"{operation.key} answers with several values, and its provider returned {type(result).__name__}"
        )
    iterator: AsyncIterator[Any] = result.__aiter__()
    return iterator


async def _stream(
    exchange: Exchange, adapter: TypeAdapter[Any], items: AsyncIterator[Any], form: Form, has_error_slot: bool
) -> None:
    exchange.watch()
    try:
        item = await anext(items, _END)
        if item is _END:
            await exchange.answer(200, form.headers, form.opening + form.closing)
            return
        start = form.opening + form.first + dumped(adapter, item) + form.after
        await exchange.begin(200, form.headers)
        try:
            await exchange.write(start)
            turn_ends = perf_counter() + TURN_SECONDS
            while (item := await anext(items, _END)) is not _END:
                await exchange.write(form.next + dumped(adapter, item) + form.after)
                if perf_counter() > turn_ends:
                    await asyncio.sleep(0)  # an iterator that is always ready must not keep others from their turn
                    turn_ends = perf_counter() + TURN_SECONDS
            if form.closing:
                await exchange.write(form.closing)
        except (asyncio.CancelledError, Exception, SystemExit) as caught:
            error = exchange.interruption() if isinstance(caught, asyncio.CancelledError) else caught
            if isinstance(error, ClientGoneError) or not has_error_slot:
                raise error  # noqa: B904  # what it was raised from stays with it, for the log
            note_failure(exchange, error)
            problem = problem_bytes(error, exchange.id)
            await exchange.write(b"event: error\n" * (form is Form.EVENTS) + form.next + problem + form.after)
        await exchange.end()
    finally:
        await _closed(items)


async def _closed(items: AsyncIterator[Any]) -> None:
    """Close the provider's iterator, so that the work behind it stops now and not when garbage is collected."""
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()
