"""A server on a real socket that answers as a test says: byte by byte, wrongly, late, or not to the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class Received:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


Answer = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


class ScriptedServer:
    """Listens on a free port of the loopback address for the length of an ``async with`` block."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.requests: list[Received] = []
        self.connections = 0
        self.hung_up = asyncio.Event()
        """Set when a client closes a connection."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (request := await _read_request(reader)) is not None:
                self.requests.append(request)
                watch = asyncio.create_task(self._watch(reader))
                answer = asyncio.ensure_future(self._answer(request, writer))
                await asyncio.wait([watch, answer], return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    answer.cancel()
                    await asyncio.wait([answer])
                    return
                watch.cancel()
                await asyncio.wait([watch])
                answer.result()
                await writer.drain()
                if writer.is_closing():
                    return
            self.hung_up.set()
        except ConnectionError:
            self.hung_up.set()
        finally:
            writer.close()

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        # the next request cannot come before this one is answered, so that only the end can
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.005)
        self.hung_up.set()


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *rest = head.strip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    parts = urlsplit(target)
    return Received(method, parts.path, dict(parse_qsl(parts.query)), headers, body)


def head(media_type: str | None, *, status: int = 200, length: int | None = None, **headers: str) -> bytes:
    """Status line and headers; without a length the body is chunked."""
    lines = [f"HTTP/1.1 {status} Scripted"]
    if media_type is not None:
        lines.append(f"content-type: {media_type}")
    lines.append("transfer-encoding: chunked" if length is None else f"content-length: {length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    """One piece of a chunked body; an empty one ends it."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def whole(body: bytes, media_type: str | None = "application/json", *, status: int = 200, **headers: str) -> Answer:
    """Answer with a body that is sent at once."""

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(media_type, status=status, length=len(body), **headers) + body)

    return answer


def pieces(*parts: bytes, media_type: str = "text/event-stream", ends: bool = True) -> Answer:
    """Answer with a chunked body of these pieces; ``ends=False`` closes the connection in the middle of it."""

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(media_type) + b"".join(chunk(part) for part in parts if part))
        if ends:
            writer.write(chunk(b""))
        else:
            await writer.drain()
            writer.close()

    return answer


def then_silence(*parts: bytes, media_type: str = "text/event-stream") -> Answer:
    """Answer with these pieces of a chunked body and then send nothing more, until the client leaves."""

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(media_type) + b"".join(chunk(part) for part in parts))
        await writer.drain()
        await asyncio.Event().wait()

    return answer


def event(value: Any, kind: str | None = None) -> bytes:
    """A server-sent event that carries JSON."""
    prefix = f"event: {kind}\n" if kind else ""
    return f"{prefix}data: {json.dumps(value)}\n\n".encode()


def problem(code: str, status: int, detail: str = "no", **members: Any) -> dict[str, Any]:
    """A problem document as the error contract lays it down."""
    return {
        "type": f"urn:llama-stack:error:{code}",
        "title": "Title",
        "status": status,
        "detail": detail,
        "instance": "urn:request:r-1",
        "error": {"message": detail, "type": "t", "code": code, "param": members.pop("param", None)},
        **members,
    }
