"""A real server on a real socket, with scripted inference behind it, and a client that sends any bytes it likes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from llama_stack.distribution import Distribution
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import Listener, listening
from llama_stack.stack import Stack, running
from llama_stack.testing.stub_inference import StubInference, StubPlugin

CHAT: dict[str, Any] = {"model": "stub", "dialog": {"message": {"role": "user", "content": "Hi"}}}
PATIENCE_SECONDS = 20
CHAT_PATH = "/inference/chat_completion"


@dataclass
class Serving:
    """A running server and what stands behind it."""

    listener: Listener
    stub: StubInference
    client: httpx2.AsyncClient
    opened: list[RawClient] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.listener.url

    async def connect(self, source: str = "127.0.0.1") -> RawClient:
        """A bare connection, from another loopback address where one is given."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.listener.port, local_addr=(source, 0))
        self.opened.append(RawClient(reader, writer))
        return self.opened[-1]


@dataclass
class RawClient:
    """Bytes out, bytes in."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, path: str, body: Any, **headers: str) -> None:
        """Send a whole JSON request."""
        data = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines += [f"content-length: {len(data)}"]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """The next response with a content-length."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(head[0].split()[1]), headers, body

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await self.reader.read()
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()


def stub_stack(*, server: dict[str, Any] | None = None, **config: Any) -> tuple[Stack, StubPlugin]:
    """A stack of one stub, not yet started."""
    plugin = StubPlugin()
    distribution = Distribution.model_validate(
        {
            "version": 1,
            "name": "served",
            "providers": {"inference": [{"provider": "stub", "config": config}]},
            "server": {"port": 0, **(server or {})},
        }
    )
    return Stack(distribution, Registry(discover(extra=[plugin]))), plugin


@asynccontextmanager
async def serving(*, server: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[Serving]:
    """Serve a stub; ``server`` are keys of the distribution's ``server``, the rest is the stub's config."""
    stack, plugin = stub_stack(server=server, **config)
    async with (
        running(stack),
        listening(stack) as listener,
        httpx2.AsyncClient(base_url=listener.url, trust_env=False, timeout=30) as client,
    ):
        served = Serving(listener, plugin.started[-1], client)
        try:
            yield served
        finally:
            for raw in served.opened:
                raw.abort()


def problem_of(response: httpx2.Response) -> dict[str, Any]:
    """The problem document of a response, checked for the parts that every one has."""
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    document: dict[str, Any] = response.json()
    check_problem(document, response.status_code)
    assert document["instance"] == f"urn:request:{response.headers['x-request-id']}"
    return document


def check_problem(document: dict[str, Any], status: int) -> None:
    """The shape that RELIABILITY's error contract gives every failure."""
    assert document["status"] == status
    code = document["error"]["code"]
    assert document["type"] == f"urn:llama-stack:error:{code}"
    assert document["error"]["message"] == document["detail"]
    assert set(document["error"]) == {"message", "type", "code", "param"}
    assert document["title"]
