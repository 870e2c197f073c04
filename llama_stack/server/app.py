"""A stack as an ASGI application: the contracts' operations, the faces, and the server's own routes.

Outermost stands ``Traffic``, then the distribution's middlewares, then the table of operations; whatever is not in the
table (the faces) is FastAPI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from ..apis import APIS
from ..distribution import ServerConfig
from ..errors import (
    FieldFault,
    MalformedJsonError,
    MethodNotAllowedError,
    RouteNotFoundError,
    StackError,
    TooLargeError,
    nearest,
)
from ..stack import Stack
from .errors import of_status, problem_bytes, problem_headers, shown
from .exchange import KEY, Exchange
from .faults import of_faults, pointer
from .health import Health
from .metrics import Metrics
from .requests import gated
from .routes import Routes
from .sites import Sites
from .traffic import Traffic, note_failure


class StackApp(FastAPI):
    """The application of one stack. ``traffic`` knows the requests that it serves."""

    def __init__(self, stack: Stack, config: ServerConfig) -> None:
        super().__init__(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        self._stack = stack
        self._faces: list[APIRouter] = []
        self._face_routes: list[BaseRoute] = []
        for kind in (StackError, HTTPException, RequestValidationError, Exception):
            self.add_exception_handler(kind, self._answer)
        # one thread: large bodies wait for one another and not the event loop for all of them
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gate")
        self._limits = config.limits
        self._framework = super().build_middleware_stack()
        self._routes = Routes(self._serve_faces, is_wrapped=bool(stack.distribution.middleware))
        inner: ASGIApp = self._routes
        for entry in reversed(stack.distribution.middleware):
            spec = stack.registry.middleware(entry.middleware).spec
            inner = spec.wrap(inner, spec.config.read(entry.config))
        metrics = Metrics(stack, lambda: self.traffic.running)
        sites = Sites(config.host, config.allowed_hosts, config.allowed_origins)
        self.traffic = Traffic(inner, sites, metrics, config.limits)
        self._routes.add_operations(stack.apis, stack, config, self._executor)
        self._routes.add_missing([api for api in APIS if api not in stack.apis], stack.distribution.name)
        Health(stack, self.traffic, metrics, self._face_documents).add_to(self._routes)

    def build_middleware_stack(self) -> ASGIApp:
        return self.traffic

    async def _serve_faces(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._framework(scope, receive, send)
            return
        scope["app"] = self
        exchange: Exchange = scope[KEY]
        exchange.watch_when_read()
        self._take_up_faces()
        if exchange.has_body and _is_json(exchange):
            receive = gated(receive, self._limits, self._executor)
        try:
            await self._framework(scope, receive, send)
        finally:
            exchange.template = getattr(scope.get("route"), "path", exchange.template)

    def _take_up_faces(self) -> None:
        """Route to the faces that are up now: one that broke down and was started again has another router."""
        faces = list(self._stack.faces.values())
        if faces != self._faces:
            self.router.routes[:] = [route for route in self.router.routes if route not in self._face_routes]
            others = len(self.router.routes)
            for router in faces:
                self.include_router(router)
            self._faces, self._face_routes = faces, self.router.routes[others:]
            self.openapi_schema = None

    def _face_documents(self) -> list[dict[str, Any]]:
        self._take_up_faces()
        return [self.openapi()] if self._faces else []

    async def _answer(self, request: Request, error: Exception) -> Response:
        exchange: Exchange = request.scope[KEY]
        exchange.template = getattr(request.scope.get("route"), "path", exchange.template)
        told = self._told(exchange, error, is_routed="route" in request.scope)
        note_failure(exchange, told)
        headers = {name.decode(): value.decode() for name, value in problem_headers(told)}
        if isinstance(error, HTTPException):  # its own say more: when to come again, which kind of key is wanted
            headers = headers | {name.lower(): value for name, value in (error.headers or {}).items()}
        return Response(problem_bytes(told, exchange.id), shown(told).status, headers)

    def _told(self, exchange: Exchange, error: Exception, *, is_routed: bool) -> Exception:
        if isinstance(error, RequestValidationError):
            return of_faults([_fault(detail) for detail in error.errors()])
        if not isinstance(error, HTTPException):
            return error
        if isinstance(error.__cause__, MalformedJsonError | TooLargeError):
            return error.__cause__  # raised in reading the body, of which FastAPI says only that it failed
        if error.status_code == 404 and not is_routed:
            path = exchange.path[:200]
            return RouteNotFoundError(f"there is nothing at {path}{nearest(path, self._routes.paths)}")
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            return MethodNotAllowedError(exchange.method[:16], exchange.template, allowed.split(", "))
        return of_status(error.status_code, str(error.detail))


def _fault(detail: Mapping[str, Any]) -> FieldFault:
    part, *path = detail["loc"]
    return FieldFault(f"?{path[0]}" if part == "query" and path else pointer(path), "invalid", detail["msg"])


def _is_json(exchange: Exchange) -> bool:
    name = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    return name == b"application/json" or name.endswith(b"+json")


def create_app(stack: Stack, config: ServerConfig | None = None) -> StackApp:
    """The ASGI application of a stack; the stack may be started before or afterwards.

    ``config`` is by default the distribution's own.
    """
    return StackApp(stack, config or stack.distribution.server)
