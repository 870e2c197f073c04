"""What this server says about itself: alive, ready, who provides what, its version, its metrics and its documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..apis import APIS
from ..errors import DrainingError, UnavailableError, listed
from ..stack import Stack
from .exchange import Exchange
from .metrics import MEDIA_TYPE, Metrics
from .openapi import DRAFT_VERSION, draft_document, extension_document
from .replies import JSON, Form, lines_form
from .routes import Routes
from .traffic import Traffic


class Health:
    """The server's own routes. ``live`` asks nobody, so that it answers whatever the providers do."""

    def __init__(self, stack: Stack, traffic: Traffic, metrics: Metrics, faces: Callable[[], list[Any]]) -> None:
        self._stack = stack
        self._traffic = traffic
        self._metrics = metrics
        self._faces = faces
        self._draft: bytes | None = None

    def add_to(self, routes: Routes) -> None:
        """Serve these routes."""
        routes.add("GET", "/health/live", self.live)
        routes.add("GET", "/health/ready", self.ready)
        routes.add("GET", "/providers/list", self.providers)
        routes.add("GET", "/version", self.version)
        routes.add("GET", "/metrics", self.metrics)
        routes.add("GET", "/openapi.json", self.draft)
        routes.add("GET", "/openapi-ext.json", self.extensions)

    async def live(self, exchange: Exchange) -> None:
        """200 as long as the event loop runs."""
        await exchange.answer(200, JSON, b'{"status":"live"}')

    async def ready(self, exchange: Exchange) -> None:
        """200 when every required provider can serve and the store takes writes, else 503; the providers in any case.

        An optional provider that cannot is listed and does not make the stack unready.
        """
        providers = self._providers()
        if self._traffic.is_draining:
            raise DrainingError("the server is shutting down", extra={"providers": providers})
        if not self._stack.is_ready:
            raise UnavailableError(self._missing(), extra={"providers": providers})
        await exchange.answer(200, JSON, _compact({"status": "ready", "providers": providers}))

    async def providers(self, exchange: Exchange) -> None:
        """Every provider of the distribution and where it stands, one a line."""
        form = lines_form(exchange)
        listed = [_compact(provider) for provider in self._providers()]
        body = b"".join(line + b"\n" for line in listed) if form is Form.LINES else b"[" + b",".join(listed) + b"]"
        await exchange.answer(200, form.headers, body)

    async def version(self, exchange: Exchange) -> None:
        """The version of this package, and of the specification that it implements."""
        about = {"name": "llama-stack", "version": _version(), "specification": DRAFT_VERSION}
        about["distribution"] = self._stack.distribution.name
        if self._stack.lock is not None:
            about["lock"] = self._stack.lock
        await exchange.answer(200, JSON, _compact(about))

    async def metrics(self, exchange: Exchange) -> None:
        """The metrics in Prometheus' text format."""
        await exchange.answer(200, [(b"content-type", MEDIA_TYPE)], self._metrics.text())

    async def draft(self, exchange: Exchange) -> None:
        """The OpenAPI document of the draft's operations, also of those that this distribution does not serve."""
        if self._draft is None:
            self._draft = json.dumps(draft_document()).encode()
        await exchange.answer(200, JSON, self._draft)

    async def extensions(self, exchange: Exchange) -> None:
        """The OpenAPI document of everything beyond the draft."""
        apis = dict.fromkeys((*APIS, *self._stack.apis))
        document = extension_document(apis, self._faces())  # made anew, for faces come and go
        await exchange.answer(200, JSON, json.dumps(document).encode())

    def _missing(self) -> str:
        store = self._stack.store
        if store is not None and not store.healthy:
            return "the store takes no writes"
        states = [status for status in self._stack.status() if status.state != "ready"]
        waiting = [
            status.id for status in states if not (status.is_optional and status.state in ("recovering", "failed"))
        ]
        return f"not ready: {listed(waiting)}" if waiting else "the stack is starting"

    def _providers(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in asdict(status).items() if value is not None}
            for status in self._stack.status()
        ]


def _version() -> str:
    try:
        return version("llama-stack")
    except PackageNotFoundError:
        return "unknown"


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
