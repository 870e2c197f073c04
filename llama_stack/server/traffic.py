"""Every request passes here: id, headers, host and origin; and on its way out, log and metrics.

``Traffic`` knows the requests that are being served, so that a shutdown can let them finish and end those that do not.
"""

from __future__ import annotations

import asyncio
from time import perf_counter

from starlette.types import ASGIApp, Receive, Scope, Send

from ..distribution import ServerLimits
from ..errors import DrainingError
from .errors import shown
from .exchange import KEY, REFUSAL, ClientGoneError, Exchange
from .log import errors as log
from .log import log_exchange
from .metrics import Metrics
from .sites import Sites

CLIENT_GONE_STATUS = 499
"""In log and metrics, the status of a request whose client left before it was answered; nothing is sent."""
CLOSE = (b"connection", b"close")


class Traffic:
    """The outermost ASGI application: wraps all others, and no failure gets past it unanswered."""

    def __init__(self, app: ASGIApp, sites: Sites, metrics: Metrics, limits: ServerLimits) -> None:
        self._app = app
        self._limits = limits
        self._sites = sites
        self._metrics = metrics
        self._running: set[Exchange] = set()
        self._idle = asyncio.Event()
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._limits)
        scope[KEY] = exchange
        self._running.add(exchange)
        try:
            await self._serve(exchange)
        finally:
            exchange.close()
            self._running.discard(exchange)
            if self.is_draining and not self._running:
                self._idle.set()
            seconds = perf_counter() - exchange.started_at
            self._metrics.count(exchange, seconds)
            log_exchange(exchange, seconds)

    async def drain(self, seconds: float, *, settle_seconds: float = 1.0) -> int:
        """Take no new work; let what runs finish, and after this time end it with ``DrainingError``.

        Returns the number of requests that could not be ended within ``settle_seconds`` more.
        """
        self.is_draining = True
        if not await self._emptied(seconds):
            for exchange in tuple(self._running):
                exchange.interrupt(DrainingError("the server is shutting down and the time to finish is over"))
            await self._emptied(settle_seconds)
        return len(self._running)

    @property
    def running(self) -> int:
        """The number of requests being served."""
        return len(self._running)

    async def _emptied(self, seconds: float) -> bool:
        if not self._running:
            return True
        self._idle.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _serve(self, exchange: Exchange) -> None:
        try:
            refusal = exchange.scope.get("extensions", {}).get(REFUSAL)
            if refusal is not None:
                exchange.standard_headers.append(CLOSE)
                raise refusal
            self._sites.check(exchange)
            preflight = self._sites.preflight(exchange)
            if preflight is not None:
                await exchange.answer(204, preflight, b"")
                return
            exchange.check_headers()
            if self.is_draining:
                exchange.standard_headers.append(CLOSE)
                if not exchange.path.startswith("/health/") and exchange.path != "/metrics":
                    raise DrainingError("the server is shutting down and takes no new work")
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            await self._fail(exchange, exchange.interruption())
        except (Exception, SystemExit) as error:  # a provider may end its own work, and not the server
            await self._fail(exchange, error)

    async def _fail(self, exchange: Exchange, error: BaseException) -> None:
        """Answer a failure; after the status is spent, cut the connection off where the answer is not complete."""
        if isinstance(error, ClientGoneError):
            exchange.code = "client_gone"
            exchange.status = exchange.status or CLIENT_GONE_STATUS
            return
        note_failure(exchange, error)
        exchange.go_around()
        if exchange.is_complete:
            return
        if exchange.has_started:
            exchange.abort()
        else:
            await exchange.answer_error(error)


def note_failure(exchange: Exchange, error: BaseException) -> None:
    """Make log and metrics say how the exchange failed; what is our own bug is logged in full."""
    told = shown(error)
    exchange.code = told.code
    if told is not error:
        log.error("request %s to %s failed", exchange.id, exchange.template, exc_info=error)
