"""The server process: how it starts, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import Response

from llama_stack.distribution import ServerConfig
from llama_stack.errors import SetupError
from llama_stack.server import listening
from llama_stack.server.process import bind
from llama_stack.stack import running
from tests.server.serving import CHAT, CHAT_PATH, check_problem, problem_of, stub_stack

pytestmark = pytest.mark.anyio

STREAM = {**CHAT, "stream": True}
BEYOND_DRAIN_SECONDS = 5
"""What RELIABILITY allows an exit beyond the drain."""
SLOW = {"delay_seconds": 0.05, "repeat": 5}
ENDLESS = {"delay_seconds": 0.02, "repeat": 100_000}


@dataclass
class Process:
    """A server in a process of its own."""

    child: asyncio.subprocess.Process
    client: httpx2.AsyncClient
    drain_seconds: float
    said: str
    """Its first line: the address, and the heavy modules that it has loaded."""

    def signal(self, number: signal.Signals) -> None:
        self.child.send_signal(number)

    async def exit_code(self) -> int:
        """Wait for the end, no longer than is promised."""
        async with asyncio.timeout(self.drain_seconds + BEYOND_DRAIN_SECONDS):
            return await self.child.wait()

    async def log(self) -> list[dict[str, Any]]:
        """The lines on stderr, each of which must be a JSON object."""
        assert self.child.stderr is not None
        return [json.loads(line) for line in (await self.child.stderr.read()).splitlines()]


@asynccontextmanager
async def process(
    config: dict[str, Any] | None = None, *, mood: str = "", drain_seconds: float = 20, **server: Any
) -> AsyncIterator[Process]:
    """Start a server and wait until it says something: its address, or that it is starting."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.server.served_process",
        json.dumps({"drain_seconds": drain_seconds, **server}),
        json.dumps(config or {}),
        *([mood] if mood else []),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    line = (await child.stdout.readline()).decode().strip()
    base = line.split()[0] if line.startswith("http") else ""
    async with httpx2.AsyncClient(base_url=base, trust_env=False, timeout=30) as client:
        try:
            yield Process(child, client, drain_seconds, line)
        finally:
            if child.returncode is None:
                child.kill()
            await child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_server_leaves_at_once_and_well(number: signal.Signals) -> None:
    """Both signals mean the same, and open idle connections hold up nothing."""
    async with process() as server:
        assert (await server.client.post(CHAT_PATH, json=CHAT)).status_code == 200
        server.signal(number)
        assert await server.exit_code() == 0
        lines = await server.log()
        assert [line["route"] for line in lines if line["logger"] == "llama_stack.access"] == [CHAT_PATH]


async def test_running_stream_may_finish_while_new_work_is_refused() -> None:
    """Ready turns 503 at once, so that the balancer stops sending; what runs is not cut short."""
    async with process(SLOW) as server, server.client.stream("POST", CHAT_PATH, json=STREAM) as response:
        lines = response.aiter_lines()
        await anext(lines)
        server.signal(signal.SIGTERM)
        while (ready := await server.client.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0)
        assert problem_of(ready)["error"]["code"] == "draining"
        assert (await server.client.get("/health/live")).status_code == 200
        refused = await server.client.post(CHAT_PATH, json=CHAT)
        assert problem_of(refused)["error"]["code"] == "draining"
        assert refused.headers["connection"] == "close"
        text = "\n".join([line async for line in lines])
        assert text.count("data: ") == 19
        assert '"finished_ok"' in text
        assert "event: error" not in text
        assert await server.exit_code() == 0


async def test_stream_that_outlives_the_drain_ends_with_a_typed_event() -> None:
    """Then the process leaves: a stream must not keep it for ever, nor be cut off without a word."""
    async with process(ENDLESS, drain_seconds=0.3) as server:
        async with server.client.stream("POST", CHAT_PATH, json=STREAM) as response:
            lines = response.aiter_lines()
            await anext(lines)
            server.signal(signal.SIGTERM)
            text = "\n".join([line async for line in lines])
        problem = json.loads(text.partition("event: error\ndata: ")[2])
        check_problem(problem, 503)
        assert problem["error"]["code"] == "draining"
        assert await server.exit_code() == 0


async def test_whole_answer_that_outlives_the_drain_is_503() -> None:
    """The same, before the first byte."""
    async with process(ENDLESS, drain_seconds=0.3) as server:
        running = asyncio.create_task(server.client.post(CHAT_PATH, json=CHAT))
        while "llama_stack_requests_running 2.0" not in (await server.client.get("/metrics")).text:
            await asyncio.sleep(0)
        server.signal(signal.SIGTERM)
        assert problem_of(await running)["error"]["code"] == "draining"
        assert await server.exit_code() == 0


async def test_many_streams_at_the_end_of_the_drain_all_get_their_event() -> None:
    """None ends without a terminal event."""
    async with process(ENDLESS, drain_seconds=0.5) as server:

        async def one() -> str:
            return (await server.client.post(CHAT_PATH, json=STREAM)).text

        streams = [asyncio.create_task(one()) for _ in range(50)]
        while "llama_stack_requests_running 51.0" not in (await server.client.get("/metrics")).text:
            await asyncio.sleep(0.01)
        server.signal(signal.SIGTERM)
        for text in await asyncio.gather(*streams):
            assert text.count("event: error") == 1
            assert text.endswith("\n\n")
        assert await server.exit_code() == 0


async def test_answer_that_is_on_its_way_is_not_cut_by_the_drain() -> None:
    """The handler has ended long before the client has taken what it wrote."""
    size = 20_000_000  # more than the kernel's buffers hold
    stack, _ = stub_stack()
    async with running(stack):
        async with listening(stack) as listener:

            @listener.app.get("/large")
            async def large() -> Response:
                return Response(b"x" * size)

            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            taking = asyncio.create_task(reader.readexactly(size))
        assert len(await taking) == size
        writer.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_ends_the_process_on_the_spot(second: signal.Signals) -> None:
    """An operator who presses Ctrl-C twice has waited enough."""
    async with (
        process(ENDLESS, drain_seconds=600) as server,
        server.client.stream("POST", CHAT_PATH, json=STREAM) as response,
    ):
        lines = response.aiter_lines()  # kept, for the client leaves when it is collected
        await anext(lines)
        server.signal(signal.SIGTERM)
        while (await server.client.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0)
        server.signal(second)
        server.drain_seconds = 0
        assert await server.exit_code() == 128 + second


@pytest.mark.parametrize("mood", ["hangs", "blocks"])
async def test_signal_during_the_start_ends_it(mood: str) -> None:
    """A model that takes minutes to load must not be waited for, be it in the loop or in a thread."""
    async with process(mood=mood, drain_seconds=0.5) as server:
        server.signal(signal.SIGTERM)
        assert await server.exit_code() == 0


async def test_provider_that_clings_to_its_work_is_left_behind() -> None:
    """One that swallows cancellation cannot keep the process."""
    async with process(mood="clings", drain_seconds=0.3) as server:
        running = asyncio.create_task(server.client.post(CHAT_PATH, json=CHAT))
        while "llama_stack_requests_running 2.0" not in (await server.client.get("/metrics")).text:
            await asyncio.sleep(0)
        server.signal(signal.SIGTERM)
        with pytest.raises(httpx2.TransportError):
            await running
        assert await server.exit_code() == 0
        assert any("did not end in time" in line["message"] for line in await server.log())


async def test_provider_that_does_not_stop_is_an_unclean_exit() -> None:
    """The exit code tells the supervisor that something was left behind."""
    async with process(mood="lingers") as server:
        server.signal(signal.SIGTERM)
        assert await server.exit_code() == 1
        assert any("did not stop within" in line["message"] for line in await server.log())


async def test_provider_that_does_everything_wrong_does_not_keep_the_process() -> None:
    """The bound on the exit is for all of it together."""
    async with process(mood="clings+stuck+lingers", drain_seconds=0.3) as server:
        running = asyncio.create_task(server.client.post(CHAT_PATH, json=CHAT))
        while "llama_stack_requests_running 2.0" not in (await server.client.get("/metrics")).text:
            await asyncio.sleep(0)
        server.signal(signal.SIGTERM)
        exiting = asyncio.create_task(server.exit_code())
        with pytest.raises(httpx2.TransportError):
            await running
        assert await exiting == 1


@pytest.mark.parametrize("mood", ["fails", "stuck+fails"])
async def test_provider_that_does_not_start_ends_the_server(mood: str) -> None:
    """With the reason on stderr, for the operator to act on, whatever the start has left behind."""
    async with process(mood=mood, drain_seconds=1) as server:
        assert await server.exit_code() == 1
        assert server.child.stderr is not None
        assert b"provider 'stub' of 'inference' did not start: the engine" in await server.child.stderr.read()


async def test_server_with_a_stub_is_light() -> None:
    """Ready after 1.2 s of work at most, in under 80 MB, without the libraries that only a provider needs."""
    async with process() as server:
        assert (await server.client.get("/health/ready")).status_code == 200
        fields = Path(f"/proc/{server.child.pid}/stat").read_text().rpartition(")")[2].split()
        assert (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") < 1.2
        assert int(fields[21]) * os.sysconf("SC_PAGE_SIZE") < 80_000_000
        assert " " not in server.said


async def test_taken_port_is_refused_with_its_number() -> None:
    """Before anything is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind(ServerConfig(port=port))


async def test_port_is_ours_once_it_is_bound() -> None:
    """Of two servers that start at once the second must be refused, and not wait for ever for its turn to listen."""
    sockets = bind(ServerConfig(port=0))
    try:
        with pytest.raises(SetupError, match="Address already in use"):
            bind(ServerConfig(port=sockets[0].getsockname()[1]))
    finally:
        for opened in sockets:
            opened.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_listening_to_other_machines_takes_a_word_of_the_operator(host: str) -> None:
    """Nothing asks a client who it is yet; whoever opens the door has to say under which names."""
    with pytest.raises(SetupError, match=r"server\.allowed_hosts"):
        bind(ServerConfig(host=host, port=0))
    for opened in bind(ServerConfig(host=host, port=0, allowed_hosts=("llama.example",))):
        opened.close()


async def test_address_of_another_machine_is_refused() -> None:
    """Another port would not help."""
    with pytest.raises(SetupError, match=r"cannot listen on '192.0.2.1': .*; set server.host"):
        bind(ServerConfig(host="192.0.2.1", port=0, allowed_hosts=("llama.example",)))


async def test_name_with_an_address_that_is_not_here_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """localhost means ::1 too, and many containers have no IPv6."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("192.0.2.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    (opened,) = bind(ServerConfig(host="localhost", port=0, allowed_hosts=("llama.example",)))
    assert opened.getsockname()[0] == "127.0.0.1"
    opened.close()


async def test_unknown_host_is_refused() -> None:
    """A typing error, not a traceback."""
    with pytest.raises(SetupError, match="cannot listen on 'no such host'"):
        bind(ServerConfig(host="no such host", port=0))


async def test_localhost_listens_on_every_family_with_one_port() -> None:
    """A client that tries ::1 first must find the same server."""
    sockets = bind(ServerConfig(host="localhost", port=0))
    assert len({opened.getsockname()[1] for opened in sockets}) == 1
    for opened in sockets:
        opened.close()
