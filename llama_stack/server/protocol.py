"""uvicorn's HTTP/1.1 protocol with limits: on headers, on chunks, on time, and on the number of connections.

uvicorn waits forever for a request to arrive and for an answer to be taken. Here every wait has an end, which one sweep
over all connections enforces: a timer a connection would cost more than the request that it guards. What is refused
before there is a request goes the way of every other failure, through the application, so that it has its problem
document, its log line and its count.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from math import inf
from typing import Any, TypeAlias

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from ..distribution import ServerLimits
from ..errors import (
    HeadersTooLargeError,
    OverloadedError,
    RequestError,
    RequestTimeoutError,
    StackError,
    TooLargeError,
)
from .exchange import ABORT, KEY, REFUSAL, Exchange
from .wire import Wire

MAX_HEADERS = 128
"""Header lines of one request."""
LINGER_SECONDS = 1.0
"""How long a client that is still sending may read an answer that did not wait for its body."""
FREE_CHUNKS = 1_024
BYTES_A_CHUNK = 256
"""Beyond ``FREE_CHUNKS``, chunks of a body must have this size on average: each costs the same work, however small."""

Event: TypeAlias = Any
"""h11 types its events and its two sentinels as one union that it does not export."""


class Phase(Enum):
    """What a connection is waiting for."""

    IDLE = "the first byte of a request"
    HEADERS = "the rest of a request's headers"
    BUSY = "the application"
    UNREAD = "the rest of a body that the answer did not wait for"
    CLOSING = "the client to take what was sent to it"


class LimitedConnection(h11.Connection):
    """h11's parser, with the limits that it leaves to others."""

    def __init__(self, limits: ServerLimits) -> None:
        super().__init__(h11.SERVER, limits.max_header_bytes)
        self._max_header_bytes = limits.max_header_bytes
        self._chunks = 0
        self._body_bytes = 0
        self.fault: StackError | None = None
        """Why ``next_event`` raised, where we know better than h11."""

    def next_event(self) -> Event:
        try:
            event: Event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                self.fault = HeadersTooLargeError(f"the headers are larger than {self._max_header_bytes} bytes")
            raise
        if type(event) is h11.Data:
            self._chunks += event.chunk_start  # the pieces of a body of declared length are the network's
            self._body_bytes += len(event.data)
            if self._chunks > FREE_CHUNKS + self._body_bytes // BYTES_A_CHUNK:
                self._refuse(TooLargeError("the body comes in too many small chunks"))
        elif type(event) is h11.Request:
            self._chunks = self._body_bytes = 0
            if event.http_version not in (b"1.1", b"1.0"):
                self._refuse(RequestError("the request is of a version of HTTP that is not spoken here"))
            names = [name for name, _ in event.headers]
            if b"transfer-encoding" in names and b"content-length" in names:  # RFC 9112 section 6.1: answer and close
                self._refuse(RequestError("content-length and transfer-encoding are both sent; keep one"))
            size = len(event.target) + sum([len(name) + len(value) + 4 for name, value in event.headers])
            if size > self._max_header_bytes:
                self._refuse(HeadersTooLargeError(f"the headers are larger than {self._max_header_bytes} bytes"))
            if len(event.headers) > MAX_HEADERS:
                self._refuse(HeadersTooLargeError(f"there are more than {MAX_HEADERS} header lines"))
            if event.target.startswith((b"http://", b"https://")):
                return _in_origin_form(event)
        return event

    def _refuse(self, error: StackError) -> None:
        self.fault = error
        raise h11.RemoteProtocolError(error.detail, error.status)


def _in_origin_form(request: h11.Request) -> h11.Request:
    """The same request as it is sent when no proxy is meant: the target's host stands for Host's (RFC 9112 3.2.2)."""
    authority, slash, path = request.target.partition(b"://")[2].partition(b"/")
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        target=slash + path or b"/",
        headers=[(b"host", authority), *headers],
        http_version=request.http_version,
    )


class LimitedProtocol(H11Protocol):
    """One connection. ``due`` is the loop's time at which the present wait ends."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._census = connections
        self._limits = connections.limits
        self._application = self.app
        self.app = self._call_application
        self.conn: LimitedConnection = LimitedConnection(connections.limits)
        self._refusal: StackError | None = None
        self._unsent_bytes = 0
        self._stall_due = inf
        self.address = ""
        self.phase = Phase.IDLE
        self.due = inf

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(Wire(transport, self._is_receiving, self._closing))
        self.address = self.client[0] if self.client else ""
        self._await(Phase.IDLE, self._limits.header_timeout_seconds)
        fault = self._census.admit(self)
        if fault is not None:
            self._refuse(fault)

    def connection_lost(self, exc: Exception | None) -> None:
        self._census.release(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None or self.phase is Phase.CLOSING:
            return
        super().data_received(data)
        self._settle()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.DONE:
            self.conn.start_next_cycle()
            self.handle_events()
        self._settle()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self.conn.fault or RequestError("the request is not HTTP/1.1 (RFC 9112)"))

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def check(self, now: float) -> None:
        """End the present wait if it has been too long.

        A client that still takes its last answer, however slowly, is given time for all but its next headers.
        """
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent_bytes:
            self._unsent_bytes, self._stall_due = unsent, now + self._limits.write_timeout_seconds
        elif unsent and now >= self._stall_due:
            self.transport.abort()
            return
        if now < self.due or (unsent and self.phase is not Phase.HEADERS):
            return
        if self.phase is Phase.HEADERS:
            seconds = self._limits.header_timeout_seconds
            self._refuse(RequestTimeoutError(f"the headers did not arrive within {seconds:g} seconds"))
        elif self.phase is Phase.CLOSING:
            self.transport.abort()
        else:
            self.transport.close()

    def _settle(self) -> None:
        """Set the limit of what the connection has come to wait for."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.phase, self.due = Phase.BUSY, inf
        elif self.conn.their_state is h11.SEND_BODY:
            if self.phase is not Phase.UNREAD:
                self._await(Phase.UNREAD, LINGER_SECONDS)
        elif self.conn.trailing_data[0]:
            if self.phase is not Phase.HEADERS:
                self._await(Phase.HEADERS, self._limits.header_timeout_seconds)
        elif self.phase is not Phase.IDLE:
            self._await(Phase.IDLE, self._limits.keep_alive_seconds)

    def _await(self, phase: Phase, seconds: float) -> None:
        self.phase, self.due = phase, self.loop.time() + seconds

    def _refuse(self, error: StackError) -> None:
        """Answer with an error that is not the application's, and close; of an answer under way, only close."""
        if self._refusal is not None:
            return
        self._refusal = error
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.keep_alive = False
            scope: Any = cycle.scope
            exchange: Exchange | None = scope.get(KEY)
            if exchange is not None:  # else it reads the refusal when it begins
                exchange.interrupt(error)
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self.due = inf
        scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "-",
            "path": "",
            "query_string": b"",
            "headers": [],
        }
        self.cycle = RequestResponseCycle(
            scope=scope,
            conn=self.conn,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            on_response=self.on_response_complete,
        )
        self.cycle.more_body = False
        self.cycle.keep_alive = False
        task = self.loop.create_task(self.cycle.run_asgi(self.app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _call_application(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["extensions"] = {ABORT: self._cut, REFUSAL: self._refusal}
        await self._application(scope, receive, send)

    def _cut(self) -> None:
        """Close in the middle of an answer, so that the client sees that it is not whole."""
        self.cycle.disconnected = True
        if self.scope["http_version"] == "1.0":  # whose answers end where the connection ends
            self.transport.abort()
        else:
            self.transport.close()

    def _is_receiving(self) -> bool:
        """Whether closing now would reset a client that is still sending."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or self.phase is Phase.HEADERS

    def _closing(self) -> None:
        self.flow.resume_reading()
        self._await(Phase.CLOSING, LINGER_SECONDS)


class Connections:
    """The open connections of one server, and the limits that hold for each and for all."""

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self._open: set[LimitedProtocol] = set()
        self._of_address: Counter[str] = Counter()

    def protocol(self, **kwargs: Any) -> LimitedProtocol:
        """What uvicorn makes for each connection."""
        return LimitedProtocol(self, **kwargs)

    def admit(self, connection: LimitedProtocol) -> StackError | None:
        """Count a new connection; the error with which to turn it away, where there are too many."""
        self._open.add(connection)
        self._of_address[connection.address] += 1
        if len(self._open) > self.limits.max_connections:
            return OverloadedError("there are too many open connections", retry_after_seconds=5)
        if self._of_address[connection.address] > self.limits.max_connections_per_address:
            return OverloadedError("there are too many open connections from this address", retry_after_seconds=5)
        return None

    def release(self, connection: LimitedProtocol) -> None:
        """A connection is gone."""
        self._open.discard(connection)
        self._of_address[connection.address] -= 1
        if not self._of_address[connection.address]:
            del self._of_address[connection.address]

    @property
    def is_sending(self) -> bool:
        """Whether there is a client that has yet to take some of its answer."""
        return any(connection.transport.get_write_buffer_size() for connection in self)

    async def watch(self) -> None:
        """Enforce the time limits until cancelled."""
        limits = self.limits
        shortest = min(
            limits.header_timeout_seconds, limits.write_timeout_seconds, limits.keep_alive_seconds, LINGER_SECONDS
        )
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(shortest / 4)
            now = loop.time()
            for connection in self:
                connection.check(now)

    def abort(self) -> None:
        """Cut off every connection."""
        for connection in self:
            connection.transport.abort()

    def __iter__(self) -> Iterator[LimitedProtocol]:
        return iter(tuple(self._open))

    def __len__(self) -> int:
        return len(self._open)
