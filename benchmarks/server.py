"""How much the server costs: requests a second beside the smallest FastAPI app, start, memory, and many open streams.

    python benchmarks/server.py                             # throughput and start
    python benchmarks/server.py --streams 500 --seconds 60  # streams held open

Ours is ``llama_stack.server.serve`` with the stub provider, its log line a request included. The other is one FastAPI
path operation over the same pydantic models, under uvicorn without an access log. Both run one worker on this machine,
each in a process of its own; the load comes from a third, over ``--connections`` keep-alive connections. Runs alternate
and the median counts, so that other work on the machine falls on both. CPU time is the server process' own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.request import urlopen

PATH = "/inference/chat_completion"
REQUEST = {
    "model": "stub",
    "dialog": {
        "message": {"role": "user", "content": "Say hello.", "tool_calls": [], "tool_responses": []},
        "message_history": [{"role": "system", "content": "Be brief.", "tool_calls": [], "tool_responses": []}],
    },
    "sampling_params": {"temperature": 0.0, "strategy": "greedy", "top_p": 0.95, "top_k": 0},
    "available_tools": [],
    "max_tokens": 0,
    "stream": False,
    "logprobs": False,
}
ANSWER = "Hello from the stub."
GOAL = 0.60
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def serve_ours(delay_seconds: float, repeat: int) -> int:
    """Serve the stub, and print the address when it is ready."""
    from llama_stack.distribution import Distribution
    from llama_stack.plugins import discover
    from llama_stack.registry import Registry
    from llama_stack.server import serve
    from llama_stack.stack import Stack
    from llama_stack.testing.stub_inference import stub

    config = {"pieces": [ANSWER], "delay_seconds": delay_seconds, "repeat": repeat}
    distribution = Distribution.model_validate(
        {
            "version": 1,
            "name": "benchmark",
            "providers": {"inference": [{"provider": "stub", "config": config}]},
            "server": {"port": 0},
        }
    )
    return serve(Stack(distribution, Registry(discover(extra=[stub]))), on_ready=lambda url: print(url, flush=True))


def serve_plain() -> int:
    """Serve the smallest FastAPI app with the same models."""
    import socket

    import uvicorn

    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only then
    bound.bind(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{bound.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config("smallest_app:app", log_level="warning", access_log=False)).run(sockets=[bound])
    return 0


class Connection(asyncio.Protocol):
    """Sends the same request again as soon as it has its answer."""

    def __init__(self, request: bytes, counts: list[int]) -> None:
        self._request = request
        self._counts = counts
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, gap, rest = self._buffer.partition(b"\r\n\r\n")
        if not gap:
            return
        found = _LENGTH.search(head)
        assert found is not None, head
        if len(rest) < int(found[1]):
            return
        assert head.startswith(b"HTTP/1.1 200"), self._buffer
        self._buffer = b""
        self._counts[0] += 1
        self._transport.write(self._request)


async def load(url: str, connections: int, seconds: float) -> int:
    """Print how many answers came within the time."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(REQUEST).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\naccept: */*\r\n"
    request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
    counts = [0]
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(lambda: Connection(request, counts), host, int(port))
    before, began = counts[0], time.perf_counter()
    await asyncio.sleep(seconds)
    print(json.dumps({"requests": counts[0] - before, "seconds": time.perf_counter() - began}))
    return 0


async def hold(url: str, streams: int, seconds: float) -> int:
    """Hold streams open; print how many ended well, their events, and what went wrong."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(REQUEST | {"stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    request = head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
    errors: list[str] = []

    async def one() -> int:
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            data = await reader.read()
            while piece := await reader.read(65_536):
                data += piece
            writer.close()
        except OSError as error:
            errors.append(str(error))
            return 0
        if not data.startswith(b"HTTP/1.1 200") or b"event: error" in data or b'"finished_ok"' not in data:
            errors.append(data[-200:].decode("latin-1"))
        return data.count(b"data: ")

    began = time.perf_counter()
    events = await asyncio.gather(*(one() for _ in range(streams)))
    took = time.perf_counter() - began
    print(json.dumps({"events": sum(events), "fewest": min(events), "errors": errors[:3], "seconds": took}))
    return 0


@dataclass
class Server:
    """A server process, and what the kernel knows about it."""

    url: str
    pid: int
    ready_seconds: float

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @property
    def megabytes(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE / 1e6

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def server(kind: str, *arguments: str) -> Iterator[Server]:
    """Start one of the servers and wait until it answers."""
    began = time.perf_counter()
    command = [sys.executable, __file__, f"--{kind}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        found = Server(url, process.pid, time.perf_counter() - began)
        if kind == "ours":
            with urlopen(f"{url}/health/ready") as response:
                assert response.status == 200
            found.ready_seconds = time.perf_counter() - began
        yield found
        process.terminate()


def measured(target: Server, connections: int, seconds: float) -> tuple[float, float]:
    """Requests a second, and microseconds of the server's CPU a request."""
    before = target.cpu_seconds
    command = [sys.executable, __file__, "--load", target.url, str(connections), str(seconds)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found["requests"] / found["seconds"], (target.cpu_seconds - before) / found["requests"] * 1e6


def compare(connections: int, seconds: float, rounds: int) -> int:
    with server("plain") as plain, server("ours", "0", "1") as ours:
        print(f"start     ours ready in {ours.ready_seconds:.2f} s with {ours.megabytes:.0f} MB resident")
        for target in (plain, ours):
            measured(target, connections, 1)
        runs: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
        for number in range(rounds):
            for name, target in (("plain", plain), ("ours", ours)):
                runs[name].append(measured(target, connections, seconds))
            print(
                f"run {number + 1}     "
                + "   ".join(f"{n} {r[-1][0]:.0f}/s {r[-1][1]:.0f} us" for n, r in runs.items())
            )
        rate = {name: median(run[0] for run in found) for name, found in runs.items()}
        cpu = {name: median(run[1] for run in found) for name, found in runs.items()}
        ratio = rate["ours"] / rate["plain"]
        print(f"median    plain {rate['plain']:.0f} requests/s ({cpu['plain']:.0f} us CPU each)")
        print(
            f"          ours  {rate['ours']:.0f} requests/s ({cpu['ours']:.0f} us CPU each), "
            f"{ours.megabytes:.0f} MB after load"
        )
        print(f"ratio     {ratio:.0%} of the smallest FastAPI app (goal {GOAL:.0%}) at {connections} connections")
        return 0 if ratio >= GOAL else 1


def hold_streams(streams: int, seconds: float) -> int:
    step_seconds = 0.5
    steps = max(1, round(seconds / step_seconds))
    with server("ours", str(step_seconds), str(steps)) as ours:
        before = ours.megabytes, ours.files
        command = [sys.executable, __file__, "--hold", ours.url, str(streams), str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            time.sleep(seconds / 2)
            during = ours.megabytes, ours.files
            output, _ = client.communicate()
        found = json.loads(output)
        time.sleep(1)
        after = ours.megabytes, ours.files
        print(
            f"streams   {streams} held for {found['seconds']:.0f} s, {found['events']} events, "
            f"fewest {found['fewest']} of {steps}"
        )
        for name, value in (("before", before), ("during", during), ("after", after)):
            print(f"{name:<9} {value[0]:.0f} MB resident, {value[1]} files open")
        print(f"errors    {len(found['errors'])} {found['errors'] or ''}")
        return 1 if found["errors"] or found["fewest"] != steps else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=None, help="length of a run, or of the streams")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=0, help="hold this many streams instead")
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--hold", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.ours:
        return serve_ours(float(chosen.ours[0]), int(chosen.ours[1]))
    if chosen.plain:
        return serve_plain()
    if chosen.load:
        return asyncio.run(load(chosen.load[0], int(chosen.load[1]), float(chosen.load[2])))
    if chosen.hold:
        return asyncio.run(hold(chosen.hold[0], int(chosen.hold[1]), float(chosen.hold[2])))
    if chosen.streams:
        return hold_streams(chosen.streams, chosen.seconds or 60)
    return compare(chosen.connections, chosen.seconds or 4, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
