"""One request and its answer: who asked, what was sent back, and the one way to end it from outside.

A client that leaves, a deadline that passes and a server that shuts down all end a request alike: ``interrupt`` cancels
the task that serves it, and whoever catches the cancellation asks ``interruption`` for the reason.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from ..distribution import ServerLimits
from ..errors import (
    DeadlineExceededError,
    FieldFault,
    InvalidRequestError,
    RequestError,
    RequestTimeoutError,
    TooLargeError,
)
from .errors import Headers, problem_bytes, problem_headers, shown

KEY = "llama_stack.exchange"
"""Where a scope holds its exchange."""
ABORT = "llama_stack.abort"
"""The ASGI extension by which our protocol lets an application cut the connection off."""
REFUSAL = "llama_stack.refusal"
"""The ASGI extension that holds the error for which our protocol refused the request before it was one."""
MAX_DEADLINE_MS = 600_000
UNHURRIED_SECONDS = 0.01
"""A call that ends sooner is not watched for a client that leaves."""

_METHODS = frozenset(("GET", "HEAD", "POST", "DELETE", "OPTIONS"))
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ONCE_ONLY = frozenset(
    (
        b"host",
        b"origin",
        b"content-type",
        b"content-length",
        b"content-encoding",
        b"transfer-encoding",
        b"x-deadline-ms",
    )
)


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete. Nobody is left to be told."""


class Exchange:
    """One HTTP exchange. ``status``, ``code`` and the byte counts are what log and metrics say about it."""

    __slots__ = (
        "_closing",
        "_disarm",
        "_interruption",
        "_limits",
        "_receive",
        "_send",
        "_taken",
        "_task",
        "_timers",
        "_watcher",
        "_wrapped_receive",
        "_wrapped_send",
        "bytes_in",
        "bytes_out",
        "code",
        "has_begun",
        "headers",
        "id",
        "is_complete",
        "is_draining",
        "method",
        "path",
        "scope",
        "standard_headers",
        "started_at",
        "status",
        "template",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: ServerLimits) -> None:
        self.started_at = perf_counter()
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        offered = self.headers.get(b"x-request-id")
        self.id = offered.decode() if offered and _REQUEST_ID.fullmatch(offered) else os.urandom(12).hex()
        self.template = "unmatched"
        """The path as the contract writes it; never the raw path, which clients choose."""
        self.status = 0
        self.code = "ok"
        self.bytes_in = 0
        self.bytes_out = 0
        self.has_begun = False
        """Whether we have begun our answer; middlewares may hold it back, so that its status is not spent yet."""
        self.is_complete = False
        self.standard_headers: Headers = [
            (b"x-request-id", self.id.encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        self._receive = receive
        self._send = send
        self._limits = limits
        self._disarm: Callable[[], None] | None = None
        self._taken: Message | None = None
        self._task = asyncio.current_task()
        self._timers: list[asyncio.TimerHandle] = []
        self._watcher: asyncio.Task[None] | None = None
        self._interruption: Exception | None = None
        self._closing = False
        self._wrapped_receive: Receive | None = None
        self._wrapped_send: Send | None = None

    @property
    def has_started(self) -> bool:
        """Whether the status is spent."""
        return self.status != 0

    @property
    def known_method(self) -> str:
        """The method for log and metrics: ``other`` for one that no contract has, for clients may make any up."""
        return self.method if self.method in _METHODS else "other"

    @property
    def has_body(self) -> bool:
        """Whether the headers announce a body of more than no bytes."""
        return bool(self.headers.get(b"content-length", b"").strip(b"0")) or b"transfer-encoding" in self.headers

    def check_headers(self) -> None:
        """Refuse headers that leave open what is meant, and arm the deadline that the client gives.

        Raises ``RequestError`` for a header that may come once and came twice, and ``InvalidRequestError`` for a
        deadline that is no number of milliseconds up to ``MAX_DEADLINE_MS``.
        """
        if len(self.headers) != len(self.scope["headers"]):
            names = [name for name, _ in self.scope["headers"]]
            twice = [name.decode() for name in sorted(_ONCE_ONLY) if names.count(name) > 1]
            if twice:
                raise RequestError(f"the header {twice[0]} is sent more than once")
        deadline = self.headers.get(b"x-deadline-ms")
        if deadline is not None:
            if not deadline.isdigit() or len(deadline) > 6 or not 0 < int(deadline) <= MAX_DEADLINE_MS:
                detail = f"X-Deadline-Ms should be a whole number of milliseconds from 1 to {MAX_DEADLINE_MS}"
                raise InvalidRequestError(detail, faults=[FieldFault("X-Deadline-Ms", "invalid", detail)])
            passed = DeadlineExceededError(f"the deadline of {int(deadline)} ms that the request gave has passed")
            self.interrupt_after(int(deadline) / 1000, passed)

    def interrupt(self, reason: Exception) -> None:
        """End the request for this reason; only the first reason counts, and an answer that is complete stays so."""
        if self._interruption is None and not self._closing and not self.is_complete and self._task is not None:
            self._interruption = reason
            self._task.cancel()

    def interrupt_after(self, seconds: float, reason: Exception) -> Callable[[], None]:
        """End the request for this reason unless it is over, or the returned function is called, before that."""
        timer = asyncio.get_running_loop().call_later(seconds, self.interrupt, reason)
        self._timers.append(timer)
        return timer.cancel

    def interruption(self) -> Exception:
        """The reason for the cancellation just caught, which is thereby dealt with.

        A cancellation that nobody asked of this task is a provider's bug: it awaited something that was cancelled.
        Raises ``CancelledError`` again when the task itself is to end.
        """
        if self._task is not None and self._task.cancelling():
            if self._interruption is None:
                raise asyncio.CancelledError
            self._task.uncancel()
        return self._interruption or RuntimeError("the provider's own work was cancelled")

    def watch(self) -> None:
        """From now on, end the request when its client leaves."""
        if self._watcher is None and not self._closing:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def watch_unhurried(self) -> None:
        """Watch for the client's leaving once the call has run for a while, for a quick one is not worth a task."""
        if not self._closing:
            self._timers.append(asyncio.get_running_loop().call_later(UNHURRIED_SECONDS, self.watch))

    def watch_when_read(self) -> None:
        """Watch as soon as the body has been read, at once if there is none: the watcher would take its messages."""
        if not self.has_body:
            self.watch_unhurried()

    @contextmanager
    def through(self, receive: Receive, send: Send) -> Iterator[None]:
        """Read and answer through the middlewares that wrapped these around our own ``receive`` and ``send``.

        For the length of the block it is this task that ``interrupt`` ends, for a middleware may have made another one.
        """
        outer = self._task
        self._wrapped_receive, self._wrapped_send, self._task = receive, send, asyncio.current_task()
        try:
            yield
        finally:
            self._task = outer

    def go_around(self) -> None:
        """Answer without the middlewares, because the failure to be answered has passed through them already."""
        self._wrapped_send = None

    async def next_message(self) -> Message:
        """The next message of the request."""
        return await (self._wrapped_receive or self.receive)()

    async def receive(self) -> Message:
        """The next message of the request, counted. Whoever reads the body, its limits on size and time hold.

        Raises ``TooLargeError``, before anything is read where the length is declared.
        """
        if self._taken is not None:
            message, self._taken = self._taken, None
            return message
        if self._disarm is None and self.has_body:
            self._begin_body()
        message = await self._receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
            if self.bytes_in > self._limits.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                if self._disarm is not None:
                    self._disarm()
                self.watch_unhurried()
        else:
            self.interrupt(ClientGoneError())
            await asyncio.sleep(0)  # here it takes effect, before a framework makes an error of its own out of it
        return message

    async def send(self, message: Message) -> None:
        """Pass a message of the answer on, counted, and with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name for name, _ in message.get("headers", ())}
            added = [pair for pair in self.standard_headers if pair[0] not in names]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        else:
            self.bytes_out += len(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)
        await self._send(message)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""
        if body or status != 204:
            headers = [*headers, (b"content-length", b"%d" % len(body))]
        await self.begin(status, headers)
        await self._send_body(body, False)

    async def answer_error(self, error: BaseException) -> None:
        """Send the problem document of an error."""
        await self.answer(shown(error).status, problem_headers(error), problem_bytes(error, self.id))

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the status and the headers."""
        self.has_begun = True
        if self._wrapped_send is not None:
            await self._wrapped_send({"type": "http.response.start", "status": status, "headers": headers})
            return
        self.status = status
        headers = [*headers, *self.standard_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes) -> None:
        """Send a piece of the body now."""
        await self._send_body(body, True)

    async def end(self) -> None:
        """Say that the body is complete."""
        await self._send_body(b"", False)

    async def _send_body(self, body: bytes, is_more_to_come: bool) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": is_more_to_come}
        if self._wrapped_send is not None:
            await self._wrapped_send(message)
            return
        self.bytes_out += len(body)
        self.is_complete = not is_more_to_come
        await self._send(message)

    def abort(self) -> None:
        """Cut the connection off, so that the client cannot take what it has for the whole answer."""
        self.is_complete = True
        abort: Any = self.scope.get("extensions", {}).get(ABORT)
        if abort is not None:
            abort()

    def close(self) -> None:
        """Stop timers and watcher; nothing ends this exchange any more."""
        self._closing = True
        for timer in self._timers:
            timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    def _begin_body(self) -> None:
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and (len(declared) > 12 or int(declared) > self._limits.max_body_bytes):
            raise self._too_large()
        seconds = self._limits.body_timeout_seconds
        late = RequestTimeoutError(f"the body did not arrive within {seconds:g} seconds")
        self._disarm = self.interrupt_after(seconds, late)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than {self._limits.max_body_bytes} bytes")

    async def _watch(self) -> None:
        while (message := await self._receive())["type"] != "http.disconnect":
            self._taken = message  # that there is no body, for whoever asks for it late
        self.interrupt(ClientGoneError())
