"""The only reader of URLs that a client chose: ``http(s)``, ``data:``, and ``file:`` under the operator's roots.

A URL in a request is an order to this machine to read something, given by a stranger. So:

* it is parsed once, by a grammar that knows less than a browser: what two parsers could read differently is refused;
* by default no host is allowed, and no file;
* a name is resolved once. Unless every address behind it is public, nothing is connected; and what is connected is the
  address that was judged, not the name again (DNS rebinding);
* a redirect is a new URL and judged like the first; there are few of them, and none from ``https`` to ``http``;
* size (also unpacked), time and headers are bounded; no cookie, key, proxy or other state of this process goes along;
* a file is opened component by component without following links.

No other code may follow a client's URL.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import socket
import ssl
import stat
import tempfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Protocol
from urllib.parse import unquote_to_bytes, urljoin

from pydantic import Field

from .apis.config import Config
from .errors import DeadlineExceededError, StorageFullError, UpstreamError, UrlNotAllowedError
from .storage.cancellation import in_thread

if TYPE_CHECKING:
    from httpcore2 import AsyncConnectionPool, AsyncNetworkStream, Response

MAX_URL_CHARACTERS = 8192
"""The longest ``http`` or ``file`` URL; a ``data:`` URL is bounded by ``max_bytes``."""
MAX_ADDRESSES = 4
"""How many addresses of a name are tried, one after the other."""
_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}

_HTTP = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][!$-;=?-\[\]_a-z~]*)?"
    r"(?:#[!-~]*)?",
)
"""RFC 3986 without user information, percent signs in hosts, and everything that is not printable ASCII."""
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*)(;base64)?,", re.ASCII)
_MEDIA_TYPE = re.compile(rb"\s*([\w.+-]+/[\w.+-]+)", re.ASCII)
_TRANSLATED = tuple(
    IPv6Network(network)
    for network in ("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fec0::/10")
)
"""IPv6 that stands for some IPv4 address, or for a site: ``is_global`` says of some of these what is not so."""

Host = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[a-z0-9_][a-z0-9_.-]*|\[[0-9a-f:]+\])$", max_length=255)]


class FetchConfig(Config):
    """What of a client's URLs may be read."""

    hosts: tuple[Host, ...] = ()
    """Hosts in lower case: ``example.com``, ``*.example.com`` for all below it, or ``*`` for every public one."""
    ports: tuple[Annotated[int, Field(ge=1, le=65_535)], ...] = (80, 443)
    """Ports that may be connected to."""
    file_roots: tuple[Path, ...] = ()
    """Absolute folders below which ``file:`` URLs may read."""
    max_bytes: int = Field(default=16 * 1024 * 1024, ge=1, le=1024**5)
    """The most that is read, packed or unpacked."""
    timeout_seconds: float = Field(default=20.0, gt=0, le=86_400)
    """How long a fetch may take, with all its redirects."""
    max_redirects: int = Field(default=3, ge=0, le=10)
    """How many redirects are followed."""


@dataclass(frozen=True)
class Fetched:
    """What a URL held."""

    url: str
    """The URL that it came from in the end."""
    body: bytes
    media_type: str | None
    """What the source calls it, in lower case. Nobody has checked that it is so."""


@dataclass(frozen=True)
class Opened:
    """What a URL holds, as a file that can be read at any place; it is closed with the block that opened it."""

    url: str
    """The URL that it came from in the end."""
    file: IO[bytes]
    media_type: str | None
    """What the source calls it, in lower case. Nobody has checked that it is so."""


Sink = Callable[[bytes], Awaitable[object]]
"""Takes a body piece by piece."""


class Network(Protocol):
    """How names are resolved and addresses connected to; tests bring one of their own."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a host. Raises ``OSError`` for one that has none."""
        ...

    async def connect(self, address: str, port: int) -> AsyncNetworkStream:
        """A stream to an address."""
        ...


class Fetcher:
    """Reads URLs within the bounds of a ``FetchConfig``. It keeps no connection and no cookie."""

    def __init__(self, config: FetchConfig, *, network: Network | None = None) -> None:
        self._config = config
        self._network = network or _System()
        self._trust: ssl.SSLContext | None = None

    async def fetch(self, url: str) -> Fetched:
        """Read a URL.

        Raises ``UrlNotAllowedError`` for one that may not be read or is not understood, ``UpstreamError`` for a source
        that fails, lies or sends too much, and ``DeadlineExceededError`` for one that takes too long.
        """
        async with self._deadline():
            if url.startswith("data:"):
                return _decoded(url, self._config.max_bytes)
            if url.startswith("file://"):
                return await asyncio.to_thread(self._read_file, url)
            body = bytearray()

            async def keep(piece: bytes) -> None:
                body.extend(piece)

            found = await self._follow(url, keep)
            return Fetched(found.url, bytes(body), found.media_type)

    @asynccontextmanager
    async def open(self, url: str, *, spool: Path | None = None) -> AsyncIterator[Opened]:
        """What a URL holds as a file for the length of the block: for content that the memory may not hold.

        A ``file:`` URL is the file itself. Anything else is written into the folder ``spool`` first (by default the
        system's for temporary files), into a file without a name, which is gone with the block and with the process.

        Raises as ``fetch`` does, and ``StorageFullError`` when the folder has no room left.
        """
        with ExitStack() as stack:
            async with self._deadline():
                if url.startswith("file://"):
                    opened = Opened(url, await in_thread(lambda: stack.enter_context(self._open_file(url))), None)
                else:
                    file = await in_thread(lambda: stack.enter_context(tempfile.TemporaryFile(dir=spool)))
                    opened = await self._spooled(url, file)
            yield opened

    async def _spooled(self, url: str, file: IO[bytes]) -> Opened:
        def write(piece: bytes) -> None:
            file.write(piece)
            file.flush()  # others may read it by its descriptor

        async def keep(piece: bytes) -> None:
            try:
                await in_thread(write, piece)
            except OSError as error:
                raise StorageFullError("there is no room left to keep what the URL holds") from error

        if url.startswith("data:"):
            decoded = _decoded(url, self._config.max_bytes)
            await keep(decoded.body)
            found = _Found(decoded.url, decoded.media_type)
        else:
            found = await self._follow(url, keep)
        file.seek(0)
        return Opened(found.url, file, found.media_type)

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                yield
        except TimeoutError as error:
            what = f"the URL was not read in {self._config.timeout_seconds:g} s"
            raise DeadlineExceededError(what) from error

    async def _follow(self, url: str, keep: Sink) -> _Found:
        for _ in range(self._config.max_redirects + 1):
            target = _parsed(url)
            self._check(target)
            answer = await self._get(target, keep)
            if isinstance(answer, _Found):
                return answer
            url = urljoin(target.url, answer)
            if target.scheme == "https" and url.startswith("http:"):
                raise UrlNotAllowedError("the URL redirects from https to http")
        raise UpstreamError(f"the URL redirects more than {self._config.max_redirects} times")

    def _check(self, target: _Target) -> None:
        allowed = self._config.hosts
        is_allowed = any(
            pattern in ("*", target.host) or (pattern.startswith("*.") and target.host.endswith(pattern[1:]))
            for pattern in allowed
        )
        if not is_allowed:
            raise UrlNotAllowedError(f"the host {target.host!r} is not among those that may be read from")
        if target.port not in self._config.ports:
            raise UrlNotAllowedError(f"the port {target.port} is not among those that may be read from")

    async def _get(self, target: _Target, keep: Sink) -> _Found | str:
        """What the target calls what it holds, which ``keep`` has then, or where it redirects to."""
        import httpcore2

        # the library connects here by name; what it gets is a stream to the address that was judged
        addresses = await self._public_addresses(target)
        headers = [("Host", target.authority), ("Accept-Encoding", "gzip"), ("User-Agent", "llama-stack")]
        url = httpcore2.URL(scheme=target.scheme, host=target.host.strip("[]"), port=target.port, target=target.target)
        connected: list[AsyncNetworkStream] = []
        try:
            async with self._pool(addresses, connected) as pool, pool.stream("GET", url, headers=headers) as response:
                return await self._read(target, response, keep)
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            raise UpstreamError(f"the URL's server failed: {type(error).__name__}") from error
        finally:
            for stream in connected:  # the library leaves one open whose handshake is cancelled
                await stream.aclose()

    def _pool(self, addresses: Sequence[str], connected: list[AsyncNetworkStream]) -> AsyncConnectionPool:
        import httpcore2

        network = self._network

        class JudgedBackend(httpcore2.AsyncNetworkBackend):
            async def connect_tcp(self, host: str, port: int, *_: object, **__: object) -> AsyncNetworkStream:
                failure: Exception | None = None
                for address in addresses:
                    try:
                        connected.append(await network.connect(address, port))
                        return connected[-1]
                    except (httpcore2.NetworkError, OSError) as error:
                        failure = error
                raise failure or OSError("no address")

        self._trust = self._trust or ssl.create_default_context()
        return httpcore2.AsyncConnectionPool(
            ssl_context=self._trust, max_connections=1, max_keepalive_connections=0, network_backend=JudgedBackend()
        )

    async def _public_addresses(self, target: _Target) -> Sequence[str]:
        try:
            addresses = await self._network.resolve(target.host.strip("[]"), target.port)
        except (OSError, UnicodeError) as error:
            raise UpstreamError(f"the host {target.host!r} has no address") from error
        if not addresses or not all(map(is_public, addresses)):
            raise UrlNotAllowedError(f"the host {target.host!r} has an address that is not public")
        return list(dict.fromkeys(addresses))[:MAX_ADDRESSES]

    async def _read(self, target: _Target, response: Response, keep: Sink) -> _Found | str:
        headers = {name.lower(): value for name, value in response.headers}
        if response.status in _REDIRECTS:
            location = headers.get(b"location", b"").decode("latin-1")
            if not location.isascii() or not location:
                raise UpstreamError("the URL redirects to nowhere")
            return location
        if response.status != 200:
            raise UpstreamError(f"the URL's server answered with {response.status}")
        unpacked = _Unpacked(headers.get(b"content-encoding", b"identity"), self._config.max_bytes)
        async for chunk in response.aiter_stream():
            await keep(unpacked.add(chunk))
        unpacked.check_end()
        found = _MEDIA_TYPE.match(headers.get(b"content-type", b""))
        return _Found(target.url, found[1].decode().lower() if found else None)

    def _read_file(self, url: str) -> Fetched:
        with self._open_file(url) as file:
            body = file.read(self._config.max_bytes + 1)
        if len(body) > self._config.max_bytes:  # it has grown since it was opened
            raise UrlNotAllowedError(f"the file holds more than {self._config.max_bytes} bytes")
        return Fetched(url, body, None)

    def _open_file(self, url: str) -> IO[bytes]:
        path = _file_path(url)
        root = next((root for root in self._config.file_roots if path.is_relative_to(root)), None)
        if root is None or not root.is_absolute():
            raise UrlNotAllowedError("the file is not below a folder that may be read from")
        return _open_below(root, path.relative_to(root), self._config.max_bytes)


def is_public(address: str) -> bool:
    """Whether an address is on the public network, and stands for no other address that might not be."""
    try:
        ip: IPv4Address | IPv6Address = ip_address(address)
    except ValueError:
        return False
    if ip.is_multicast or ip.is_reserved or not ip.is_global:
        return False
    if isinstance(ip, IPv6Address):
        return ip.scope_id is None and not any(ip in network for network in _TRANSLATED)
    return True


@dataclass(frozen=True)
class _Found:
    """What a body was called, and the URL that it came from in the end."""

    url: str
    media_type: str | None


@dataclass(frozen=True)
class _Target:
    """An ``http(s)`` URL, taken apart once."""

    scheme: str
    host: str
    """Lower case, without the dot of the root; an IPv6 address in its brackets."""
    port: int
    target: str

    @property
    def authority(self) -> str:
        return self.host if self.port == _DEFAULT_PORTS[self.scheme] else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def _parsed(url: str) -> _Target:
    found = _HTTP.fullmatch(url) if len(url) <= MAX_URL_CHARACTERS else None
    if found is None:
        raise UrlNotAllowedError(
            "the URL is not one that is read here; write http(s)://HOST/PATH in plain ASCII, without user or password"
        )
    target = found["target"] or "/"
    port = int(found["port"] or _DEFAULT_PORTS[found["scheme"]])
    return _Target(
        found["scheme"], found["host"].lower().rstrip("."), port, target if target.startswith("/") else f"/{target}"
    )


class _Unpacked:
    """A body as it arrives, unpacked, and bounded before and after."""

    def __init__(self, encoding: bytes, max_bytes: int) -> None:
        name = encoding.strip().lower()
        if name not in (b"identity", b"gzip", b"x-gzip", b""):
            raise UpstreamError(f"the URL's server packs its answer in a way that it was not asked for: {name[:20]!r}")
        self._gzip = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS) if b"gzip" in name else None
        self._max_bytes = max_bytes
        self._received = 0
        self._unpacked = 0

    def add(self, chunk: bytes) -> bytes:
        self._received += len(chunk)
        room = self._max_bytes - self._unpacked
        if self._gzip is not None:
            try:
                chunk = self._gzip.decompress(chunk, room + 1)
            except zlib.error as error:
                raise UpstreamError("the URL's server sent gzip that cannot be unpacked") from error
        if len(chunk) > room or self._received > self._max_bytes:
            raise UpstreamError(f"the URL holds more than {self._max_bytes} bytes")
        self._unpacked += len(chunk)
        return chunk

    def check_end(self) -> None:
        if self._gzip is not None and (not self._gzip.eof or self._gzip.unused_data):
            raise UpstreamError("the URL's server sent gzip that ends too early or goes on after its end")


def _decoded(url: str, max_bytes: int) -> Fetched:
    """A ``data:`` URL (RFC 2397)."""
    head = _DATA.match(url)
    if head is None:
        raise UrlNotAllowedError("the data: URL is not of the form data:TYPE/SUBTYPE;base64,DATA")
    if len(url) > 4 * max_bytes + MAX_URL_CHARACTERS:
        raise UrlNotAllowedError(f"the data: URL holds more than {max_bytes} bytes")
    body = unquote_to_bytes(url[head.end() :])
    if head[3]:
        try:
            body = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UrlNotAllowedError("the data: URL is not valid base64") from error
    if len(body) > max_bytes:
        raise UrlNotAllowedError(f"the data: URL holds more than {max_bytes} bytes")
    return Fetched("data:", body, (head[1] or "text/plain").lower())


def _file_path(url: str) -> Path:
    found = re.fullmatch(r"file://(/[^?#\\]*)", url)
    raw = unquote_to_bytes(found[1]) if found and len(url) <= MAX_URL_CHARACTERS else b""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text or any(part in (".", "..", "") for part in text.split("/")[1:]):
        raise UrlNotAllowedError("the file: URL is not of the form file:///ABSOLUTE/PATH, without '.' and '..'")
    return Path(text)


def _open_below(root: Path, path: Path, max_bytes: int) -> IO[bytes]:
    """A regular file below a folder. No component is a link, and none can become one between look and open."""
    opened: list[int] = []
    try:
        opened.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for part in path.parts[:-1]:
            opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=opened[-1]))
        # without O_NONBLOCK a pipe would be waited for
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        opened.append(os.open(path.name, flags, dir_fd=opened[-1]))
        found = os.fstat(opened[-1])
        if not stat.S_ISREG(found.st_mode):
            raise UrlNotAllowedError("the file: URL names no regular file")
        if found.st_size > max_bytes:
            raise UrlNotAllowedError(f"the file holds more than {max_bytes} bytes")
        return os.fdopen(opened.pop(), "rb")
    except OSError as error:
        raise UrlNotAllowedError("the file: URL names no file that can be read") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


class _System:
    """The machine's own resolver and network. No proxy: what the environment says of one is not read."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(address[4][0]) for address in found]

    async def connect(self, address: str, port: int) -> AsyncNetworkStream:
        import httpcore2

        return await httpcore2.AnyIOBackend().connect_tcp(address, port)
