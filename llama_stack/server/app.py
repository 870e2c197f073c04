"""A stack as an ASGI application: the contracts' operations, the faces, and the server's own routes.

Outermost stands ``Traffic``, then the distribution's middlewares, then the table of operations; whatever is not in the
table (the faces) is FastAPI's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from ..apis import APIS
from ..distribution import ServerConfig
from ..errors import FieldFault, MethodNotAllowedError, RouteNotFoundError, StackError, nearest
from ..stack import Stack
from .errors import of_status, problem_bytes, problem_headers, shown
from .exchange import KEY, Exchange
from .faults import of_faults, pointer
from .health import Health
from .metrics import Metrics
from .routes import Routes
from .sites import Sites
from .traffic import Traffic, note_failure


class StackApp(FastAPI):
    """The application of one stack. ``traffic`` knows the requests that it serves."""

    def __init__(self, stack: Stack, config: ServerConfig) -> None:
        super().__init__(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        self._stack = stack
        self._faces: set[str] = set()
        for kind in (StackError, HTTPException, RequestValidationError, Exception):
            self.add_exception_handler(kind, self._answer)
        # one thread: large bodies wait for one another and not the event loop for all of them
        executor = ThreadPoolExecutor(1, thread_name_prefix="gate")
        self._routes = Routes(super().build_middleware_stack())
        inner: ASGIApp = self._routes
        for entry in reversed(stack.distribution.middleware):
            spec = stack.registry.middleware(entry.middleware).spec
            inner = spec.wrap(inner, spec.config.model_validate(entry.config))
        metrics = Metrics(stack, lambda: self.traffic.running)
        sites = Sites(config.host, config.allowed_hosts, config.allowed_origins)
        self.traffic = Traffic(inner, sites, metrics)
        self._routes.add_operations(stack.apis, stack, config, executor)
        self._routes.add_missing([api for api in APIS if api not in stack.apis], stack.distribution.name)
        Health(stack, self.traffic, metrics, self._face_documents).add_to(self._routes)
        self.add_faces()

    def add_faces(self) -> None:
        """Serve the faces that the stack has started; call it again when it has started more."""
        for name, router in self._stack.faces.items():
            if name not in self._faces:
                self._faces.add(name)
                self.include_router(cast(APIRouter, router))

    def build_middleware_stack(self) -> ASGIApp:
        return self.traffic

    def _face_documents(self) -> list[dict[str, Any]]:
        return [self.openapi()] if self._faces else []

    async def _answer(self, request: Request, error: Exception) -> Response:
        exchange: Exchange = request.scope[KEY]
        exchange.template = getattr(request.scope.get("route"), "path", exchange.template)
        told = self._told(exchange, error)
        note_failure(exchange, told)
        headers = {name.decode(): value.decode() for name, value in problem_headers(told)}
        return Response(problem_bytes(told, exchange.id), shown(told).status, headers)

    def _told(self, exchange: Exchange, error: Exception) -> Exception:
        if isinstance(error, RequestValidationError):
            return of_faults([FieldFault(pointer(e["loc"][1:]), "invalid", e["msg"]) for e in error.errors()])
        if not isinstance(error, HTTPException):
            return error
        if error.status_code == 404:
            path = exchange.path[:200]
            return RouteNotFoundError(f"there is nothing at {path}{nearest(path, self._routes.paths)}")
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            return MethodNotAllowedError(exchange.method[:16], exchange.template, allowed.split(", "))
        return of_status(error.status_code, str(error.detail))


def create_app(stack: Stack, config: ServerConfig | None = None) -> StackApp:
    """The ASGI application of a stack; the stack may be started before or afterwards.

    ``config`` is by default the distribution's own.
    """
    return StackApp(stack, config or stack.distribution.server)
