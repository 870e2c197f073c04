"""The server process: listens, serves while the stack starts, and on a signal drains, stops and leaves.

uvicorn never ends while a stream is open, so the drain is ours: readiness turns 503 at once, new work is refused,
running work may finish, and what has not finished in time ends with a typed error. A second signal ends the process on
the spot.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn

from ..distribution import ServerConfig
from ..errors import SetupError
from ..stack import Stack
from .app import StackApp, create_app
from .log import logging_to_stderr
from .protocol import Connections
from .sites import bracketed

SETTLE_SECONDS = 0.75
"""How long requests that were ended may take to say so, and what then clings may take to let go."""
STOP_SECONDS = 3.0
"""How long the providers may take to stop. With twice the above it stays below the five seconds that are promised."""

_THREADS = "blocking"
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Why an address cannot be listened on that this machine does not have: localhost is ::1 also where IPv6 is off."""
_UNSENT_BYTES = 128 * 1024
"""What the kernel takes of an answer ahead of its client. With megabytes ahead, as is its way, a client that takes them
slowly would look like one that takes nothing."""
_GLANCE_SECONDS = 0.02
"""How often it is looked whether what is waited for, and does not tell, has come."""

log = logging.getLogger("llama_stack.server")
Announce = Callable[[str], object]


def serve(stack: Stack, config: ServerConfig | None = None, *, on_ready: Announce | None = None) -> int:
    """Serve a stack until a signal ends it; returns the exit code.

    0 after an orderly shutdown, 1 where the store failed or the providers did not stop in time. ``on_ready`` is called
    with the server's address once all providers are up. Raises ``SetupError`` where the server cannot listen or a
    provider that the distribution requires does not start.
    """
    with logging_to_stderr():
        return asyncio.run(_serve(stack, config or stack.distribution.server, on_ready))


class Listener:
    """A server that listens. ``url`` is its address, ``app`` what it serves."""

    def __init__(self, app: StackApp, sockets: list[socket.socket], config: ServerConfig) -> None:
        self.app = app
        host, port = sockets[0].getsockname()[:2]
        self.url = f"http://{bracketed(host)}:{port}"
        self.port: int = port
        self.connections = Connections(config.limits)
        self._seconds = config.drain_seconds
        self._sockets = sockets
        settings = uvicorn.Config(
            app.traffic,  # what the app itself would call, after telemetry that nobody here reads
            http=self.connections.protocol,  # type: ignore[arg-type]  # called like a class
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level=logging.ERROR,
            proxy_headers=False,
            server_header=False,
        )
        self._server = _Server(settings, self.connections)
        self._task: asyncio.Task[None] | None = None
        self._sweep: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._server._serve(self._sockets), name="uvicorn")
        self._sweep = asyncio.create_task(self.connections.watch(), name="connection limits")
        await self._server.listening.wait()

    async def drain(self) -> None:
        """Refuse new work, and wait until what runs has finished or was ended, and its answers are taken."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._seconds + SETTLE_SECONDS
        left = await self.app.traffic.drain(self._seconds, settle_seconds=SETTLE_SECONDS)
        if left:
            log.error("%d requests did not end in time and are cut off", left)
        while self.connections.is_sending:
            if loop.time() > ends:
                log.error("answers that their clients did not take in time are cut off")
                break
            await asyncio.sleep(_GLANCE_SECONDS)

    async def close(self) -> None:
        """Close every connection and stop listening."""
        self._server.told_to_stop.set()
        if self._task is not None:
            await self._task
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.wait([self._sweep])


@asynccontextmanager
async def listening(stack: Stack, config: ServerConfig | None = None) -> AsyncIterator[Listener]:
    """Serve a stack, started or not, for the length of a block; at its end running requests may finish.

    Raises ``SetupError`` where the server cannot listen.
    """
    config = config or stack.distribution.server
    listener = Listener(create_app(stack, config), bind(config), config)
    try:
        await listener.open()
        yield listener
        await listener.drain()
    finally:
        await listener.close()


def bind(config: ServerConfig) -> list[socket.socket]:
    """Sockets on every address of ``config.host``.

    Raises ``SetupError`` when the port is taken, the host is unknown, or other machines could reach the server though
    nobody has said under which names they may.
    """
    host, port = config.host, config.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        what = f"cannot listen on {host!r}: {error.strerror}; set server.host to an address of this machine"
        raise SetupError(what) from error
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    if not config.allowed_hosts and not all(_is_loopback(str(address[0])) for _, address in addresses):
        raise SetupError(
            f"server.host {host!r} lets other machines in, and nothing here asks who they are; name the hosts that "
            'clients will use under server.allowed_hosts (["*"] for any, behind a proxy that checks), '
            "or listen on 127.0.0.1"
        )
    sockets: list[socket.socket] = []
    absent = ""
    for family, address in addresses:
        chosen = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(_bound(family, (str(address[0]), chosen, *address[2:])))
        except OSError as error:
            if error.errno in _NOT_HERE:
                absent = str(error.strerror)
                continue
            for opened in sockets:
                opened.close()
            what = f"cannot listen on {bracketed(host)}:{port}: {error.strerror}; choose another server.port"
            raise SetupError(what) from error
    if not sockets:
        raise SetupError(f"cannot listen on {host!r}: {absent}; set server.host to an address of this machine")
    return sockets


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only for these
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # what is accepted inherits it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        bound.listen()  # only this finds out that another server, bound as we are, was quicker
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class _Server(uvicorn.Server):
    """uvicorn without its signals and its shutdown, for the process has its own."""

    def __init__(self, settings: uvicorn.Config, connections: Connections) -> None:
        super().__init__(settings)
        self.listening = asyncio.Event()
        self.told_to_stop = asyncio.Event()
        self._connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        while not self.told_to_stop.is_set():
            await self.on_tick(0)  # renews the Date header
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self.told_to_stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listening in sockets or ():
            listening.close()
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        for task in tuple(self.server_state.tasks):
            task.cancel()
        await asyncio.sleep(0)  # connections that were closed say so in the next turn
        self._connections.abort()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(stack: Stack, config: ServerConfig, on_ready: Announce | None) -> int:
    threads = ThreadPoolExecutor(thread_name_prefix=_THREADS)
    asyncio.get_running_loop().set_default_executor(threads)
    refusal: SetupError | None = None
    try:
        code = await _serve_until_told(stack, config, on_ready)
    except SetupError as error:
        code, refusal = 1, error
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    if await _something_clings():
        if refusal is not None:
            log.critical("%s", refusal.detail)  # nobody else will have the time to say it
        log.error("work that does not end is left behind")
        logging.shutdown()
        os._exit(code)  # asyncio and the interpreter would wait for it for ever
    if refusal is not None:
        raise refusal
    return code


async def _serve_until_told(stack: Stack, config: ServerConfig, on_ready: Announce | None) -> int:
    with _signals() as told_to_stop:
        async with listening(stack, config) as listener:
            holder = asyncio.create_task(_hold(stack, listener, on_ready), name="stack")
            told = asyncio.create_task(told_to_stop.wait())
            failed = asyncio.create_task(stack.failed())
            await asyncio.wait([holder, told, failed], return_when=asyncio.FIRST_COMPLETED)
            has_failed = failed.done()
            if has_failed:
                log.critical("the store failed and cannot be trusted; the server ends, and its next start recovers it")
            told.cancel()
            failed.cancel()
        return max(await _ended(holder), int(has_failed))


async def _hold(stack: Stack, listener: Listener, on_ready: Announce | None) -> None:
    """Start the stack, keep it until cancelled, and stop it."""
    try:
        await stack.start()
        if on_ready is not None:
            on_ready(listener.url)
        await asyncio.Event().wait()
    finally:
        await stack.stop()


async def _ended(holder: asyncio.Task[None]) -> int:
    holder.cancel()
    done, _ = await asyncio.wait([holder], timeout=STOP_SECONDS)
    if not done:
        log.error("the providers did not stop within %g seconds", STOP_SECONDS)
        return 1
    with suppress(asyncio.CancelledError):
        holder.result()
    return 0


async def _something_clings() -> bool:
    """Whether a task goes on though it was cancelled, or a thread that was handed work does not come back."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + SETTLE_SECONDS
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks and (await asyncio.wait(tasks, timeout=SETTLE_SECONDS))[1]:
        return True
    while any(thread.name.startswith(_THREADS) for thread in threading.enumerate()):
        if loop.time() > ends:
            return True
        await asyncio.sleep(_GLANCE_SECONDS)
    return False


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGTERM or SIGINT sets; the second ends the process on the spot."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)  # nothing is waited for any more
        received.append(number)
        loop.call_soon_threadsafe(told.set)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
