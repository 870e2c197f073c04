"""The operations of the contracts as routes: found by one look in a table, served by reading, calling and replying.

Nothing about an operation is stated here. Every path is served with and without its trailing slash, and never
redirected (spec rule G16).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from inspect import isawaitable

from starlette.types import ASGIApp, Receive, Scope, Send

from ..apis.contract import Api, Operation, operations
from ..distribution import ServerConfig
from ..errors import MethodNotAllowedError, NotProvidedError
from ..stack import Stack
from .exchange import KEY, ClientGoneError, Exchange
from .replies import reply
from .requests import Reader
from .traffic import note_failure

Endpoint = Callable[[Exchange], Awaitable[None]]


class OperationEndpoint:
    """Serves one operation with whatever the stack has for its API."""

    def __init__(self, operation: Operation, stack: Stack, config: ServerConfig, executor: Executor) -> None:
        self._operation = operation
        self._stack = stack
        self._reader = Reader(operation, config, executor)

    async def __call__(self, exchange: Exchange) -> None:
        operation = self._operation
        arguments = await self._reader.read(exchange)
        if operation.body is None:
            exchange.watch_unhurried()
        result = getattr(self._stack.api(operation.api), operation.name)(**arguments)
        if isawaitable(result):
            result = await result
        await reply(exchange, operation, result)


class Routes:
    """An ASGI application over a table of endpoints; what is not in the table goes to ``fallback``."""

    def __init__(self, fallback: ASGIApp, *, is_wrapped: bool = False) -> None:
        """``is_wrapped`` says that middlewares stand before the table."""
        self._fallback = fallback
        self._is_wrapped = is_wrapped
        self._table: dict[str, tuple[str, dict[str, Endpoint]]] = {}

    def add(self, method: str, path: str, endpoint: Endpoint) -> None:
        """Serve an endpoint at a path, with and without its trailing slash; HEAD where GET is."""
        for form in {path, path.removesuffix("/") or "/", f"{path.removesuffix('/')}/"}:
            methods = self._table.setdefault(form, (path, {}))[1]
            methods[method] = endpoint
            if method == "GET":
                methods["HEAD"] = endpoint

    def add_operations(self, apis: Iterable[type[Api]], stack: Stack, config: ServerConfig, executor: Executor) -> None:
        """Serve every operation of these contracts."""
        for api in apis:
            for operation in operations(api):
                endpoint = OperationEndpoint(operation, stack, config, executor)
                self.add(operation.method, operation.path, endpoint)

    def add_missing(self, apis: Iterable[type[Api]], distribution: str) -> None:
        """Answer 501 for every operation of these contracts, which the distribution names no provider for."""
        for api in apis:
            for operation in operations(api):
                self.add(operation.method, operation.path, _missing(operation, distribution))

    @property
    def paths(self) -> list[str]:
        """Every path that is served, as its contract writes it."""
        return sorted({template for template, _ in self._table.values()})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._table.get(scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await self._fallback(scope, receive, send)
            return
        exchange: Exchange = scope[KEY]
        if not self._is_wrapped:
            await self._serve(exchange, *found)
            return
        with exchange.through(receive, send):
            try:
                await self._serve(exchange, *found)
            except (asyncio.CancelledError, Exception, SystemExit) as caught:
                error = exchange.interruption() if isinstance(caught, asyncio.CancelledError) else caught
                if exchange.has_begun or isinstance(error, ClientGoneError):
                    raise error  # noqa: B904  # what it was raised from stays with it, for the log
                note_failure(exchange, error)  # so that middlewares see an answer, as clients do
                await exchange.answer_error(error)

    async def _serve(self, exchange: Exchange, template: str, methods: dict[str, Endpoint]) -> None:
        exchange.template = template
        endpoint = methods.get(exchange.method)
        if endpoint is None:
            raise MethodNotAllowedError(exchange.method[:16], template, methods)
        await endpoint(exchange)


def _missing(operation: Operation, distribution: str) -> Endpoint:
    api = operation.api.name

    async def answer_501(exchange: Exchange) -> None:
        raise NotProvidedError(
            f"distribution {distribution!r} has no provider of {api!r}; the operator adds one under providers.{api}"
        )

    return answer_501
