"""A network of a test's own, and the URLs and servers that try to lead somewhere they must not.

Whatever reads a URL that a client, a model or another server chose is tried with all of them. Nothing real is reached:
public addresses lead to servers of the test, and a connection to any other address is counted::

    network = StagedNetwork()
    fetcher = Fetcher(FetchConfig(hosts=("*",)), network=network)
    for url in HOSTILE_URLS:
        with pytest.raises(StackError):
            await whatever_follows_it(url, fetcher)
    assert network.honeypot == 0
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..fetch import is_public

if TYPE_CHECKING:
    from httpcore2 import AsyncNetworkStream

PUBLIC = "93.184.216.34"
"""Where ``serving`` puts a server, and what ``public.example`` resolves to."""
OTHER = "2606:2800:220:1:248:1893:25c8:1946"
INTERNAL = "10.0.0.5"

HOSTILE_URLS = (
    "http://127.0.0.1/", "http://localhost/", "http://127.1/", "http://2130706433/", "http://0x7f000001/",
    "http://0177.0.0.1/", "http://0/", "http://0.0.0.0/", "http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/", "http://[64:ff9b::7f00:1]/", "http://[::127.0.0.1]/", "http://169.254.169.254/",
    "http://[fd00:ec2::254]/", "http://metadata.google.internal/", "http://100.100.100.200/", "http://10.0.0.1/",
    "http://192.168.0.1/", "http://172.16.0.1/", "http://100.64.0.1/", "http://198.18.0.1/",
    "http://example.com@127.0.0.1/", "http://127.0.0.1\\@example.com/", "http://example.com\\@127.0.0.1/",
    "http://example.com#@127.0.0.1/", "http://127.0.0.1%00.example.com/", "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/", "http://LOCALHOST./", "http://[fe80::1%25lo]/", "http://93.184.216.34:6379/",
    "gopher://127.0.0.1/", "ftp://127.0.0.1/", "file:///etc/passwd", "file://localhost/etc/passwd", "FILE:/etc/passwd",
    " http://127.0.0.1/", "http:127.0.0.1", "http:///127.0.0.1", "data:text/plain;base64," + "A" * 400_000,
)  # fmt: skip
"""What matters is the address behind them, never the spelling. One, ``example.com#@...``, is a public name's."""

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
"""Answers a request, of which it is given the head and, as far as its length is told, the body."""


class StagedNetwork:
    """Names and addresses of its own, as a ``Fetcher`` takes them: what no server was put at leads nowhere."""

    def __init__(self) -> None:
        self.names: dict[str, list[Sequence[str]]] = {
            "localhost": [["127.0.0.1"]],
            "metadata.google.internal": [["169.254.169.254"]],
            "example.com": [["93.184.215.14"]],
        }
        """The addresses of each name: one answer after the other, the last for good."""
        self.ports: dict[str, int] = {}
        self.honeypot = 0
        """Connections to what should never be connected to."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        if host in self.names:
            answers = self.names[host]
            return answers.pop(0) if len(answers) > 1 else answers[0]
        numeric = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [str(found[4][0]) for found in numeric]

    async def connect(self, address: str, port: int) -> AsyncNetworkStream:
        import httpcore2

        if address not in self.ports:
            self.honeypot += not is_public(address)
            raise OSError(f"no server of this test is at {address}")
        return await httpcore2.AnyIOBackend().connect_tcp("127.0.0.1", self.ports[address])


@asynccontextmanager
async def serving(
    network: StagedNetwork, handler: Handler, *, address: str = PUBLIC, tls: ssl.SSLContext | None = None
) -> AsyncIterator[list[bytes]]:
    """A server at an address, by default as ``public.example``; yields the requests that it was sent."""
    requests: list[bytes] = []
    answers: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers.add(asyncio.current_task())
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
            requests.append(head + await reader.readexactly(int(length)))
            await handler(requests[-1], writer)
            await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    network.ports[address] = server.sockets[0].getsockname()[1]
    network.names.setdefault("public.example", [[address]])
    try:
        yield requests
    finally:
        await asyncio.gather(*filter(None, answers))
        server.close()
        await server.wait_closed()


def answering(*parts: bytes) -> Handler:
    """A server that gives these parts to whoever asks."""

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.writelines(parts)

    return handler


def ok(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """A whole answer."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: int = 302) -> bytes:
    """An answer that sends its reader elsewhere."""
    return f"HTTP/1.1 {status} Moved\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode()


@dataclass(frozen=True)
class HostileServer:
    """A server at ``public.example`` that means no good, and how that name resolves."""

    name: str
    handler: Handler
    addresses: Sequence[Sequence[str]] = field(default=((PUBLIC,),))
    """What the name resolves to, time after time."""
    address: str = PUBLIC
    """Where the server is."""
    is_tls: bool = False


async def _endless(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"a" * 65_536)
        await writer.drain()


async def _dripping(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    while True:
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(0.01)


async def _hopping(request: bytes, writer: asyncio.StreamWriter) -> None:
    hops = request.split(b" ")[1].count(b"x")
    writer.write(redirect("/" + "x" * (hops + 1)) if hops < 4 else redirect("http://127.0.0.1/admin"))


async def _echoing(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(ok(request, "set-cookie: id=1", "www-authenticate: Basic realm=x"))


async def _silent(request: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.6)


HOSTILE_SERVERS = (
    *(
        HostileServer(f"{status} to this machine", answering(redirect("http://127.0.0.1/admin", status)))
        for status in (301, 302, 303, 307, 308)
    ),
    HostileServer("from https to http", answering(redirect("http://127.0.0.1/admin")), is_tls=True),
    HostileServer("four hops", _hopping),
    HostileServer("to a file", answering(redirect("file:///etc/passwd"))),
    HostileServer("a name that changes its mind", answering(ok(b"public")), addresses=((PUBLIC,), ("127.0.0.1",))),
    HostileServer("an inner address among public ones", answering(ok(b"x")), addresses=((PUBLIC, INTERNAL),)),
    HostileServer("an alias of an inner name", answering(ok(b"x")), addresses=((INTERNAL,),)),
    HostileServer("IPv6 alone", answering(ok(b"six")), addresses=((OTHER,),), address=OTHER),
    HostileServer("a body without end", _endless),
    HostileServer("a body that drips", _dripping),
    HostileServer("a length that lies", answering(b"HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\nshort")),
    HostileServer("a bomb", answering(ok(gzip.compress(bytes(10_000_000)), "content-encoding: gzip"))),
    HostileServer("a header of a megabyte", answering(ok(b"x", "x-long: " + "a" * 1_000_000))),
    HostileServer("a type that lies", answering(ok(b"\x7fELF", "content-type: image/png"))),
    HostileServer("an echo with a cookie", _echoing),
    HostileServer(
        "a close in the middle", answering(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
    ),
    HostileServer("silence", _silent),
)
"""The plan's live servers, but for TLS that never gets anywhere, which is silence to whoever waits."""
