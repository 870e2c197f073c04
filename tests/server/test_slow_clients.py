"""Clients that are slow, greedy or broken: each is cut off, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Response

from llama_stack.server.protocol import Phase
from tests.server.serving import CHAT, CHAT_PATH, RawClient, Serving, check_problem, serving

pytestmark = pytest.mark.anyio

LIMITS = {
    "header_timeout_seconds": 0.3,
    "body_timeout_seconds": 0.3,
    "write_timeout_seconds": 0.3,
    "keep_alive_seconds": 0.3,
    "max_header_bytes": 4096,
    "max_body_bytes": 65_536,
}
HEAD = b"POST /inference/chat_completion HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    async with serving(server={"limits": LIMITS}) as found:
        yield found


async def refused_with(client: RawClient, status: int) -> str:
    """The code of the problem that the server sends before it closes."""
    found, headers, body = await client.response()
    assert found == status
    assert headers["content-type"] == "application/problem+json"
    document = json.loads(body)
    check_problem(document, status)
    assert await client.rest() == b""
    code: str = document["error"]["code"]
    return code


async def drip(client: RawClient, data: bytes) -> None:
    """Send byte by byte for as long as the server listens."""
    for value in data * 1000:
        if client.writer.is_closing():
            return
        client.writer.write(bytes([value]))
        await asyncio.sleep(0.02)


async def test_connection_that_sends_nothing_is_closed(served: Serving) -> None:
    """It asked nothing, so it gets no answer either."""
    client = await served.connect()
    assert await client.rest() == b""


async def test_headers_that_never_end_are_cut_off(served: Serving) -> None:
    """The time is for all the headers, so dripping does not renew it."""
    client = await served.connect()
    dripping = asyncio.create_task(drip(client, b"a"))
    await client.send(b"GET /version HTTP/1.1\r\nhost: localhost\r\nx-drip: ")
    assert await refused_with(client, 408) == "request_timeout"
    dripping.cancel()


async def test_headers_that_drip_are_told_why(served: Serving) -> None:
    """Closing while bytes still come would reset the connection, and take the answer with it."""
    client = await served.connect()
    await client.send(b"GET /version HTTP/1.1\r\nhost: localhost\r\nx-drip: ")
    for _ in range(60):  # nothing is read meanwhile
        await client.send(b"a")
        await asyncio.sleep(0.01)
    assert await refused_with(client, 408) == "request_timeout"


@pytest.mark.parametrize("framing", [b"content-length: 500\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
async def test_body_that_never_comes_is_cut_off(served: Serving, framing: bytes) -> None:
    """An idle body holds a connection and memory."""
    client = await served.connect()
    await client.send(HEAD + framing)
    assert await refused_with(client, 408) == "request_timeout"


async def test_body_that_drips_is_cut_off(served: Serving) -> None:
    """The time is for the whole body."""
    client = await served.connect()
    await client.send(HEAD + b"content-length: 5000\r\n\r\n")
    dripping = asyncio.create_task(drip(client, b" "))
    assert await refused_with(client, 408) == "request_timeout"
    dripping.cancel()


async def test_body_for_a_route_that_reads_none_is_cut_off(served: Serving) -> None:
    """An answer that does not wait for the body must not leave the connection open for it."""
    client = await served.connect()
    await client.send(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n")
    assert await refused_with(client, 404) == "route_not_found"


async def test_kept_connection_that_sends_nothing_more_is_closed(served: Serving) -> None:
    """A hoard of idle connections is bounded in time."""
    client = await served.connect()
    await client.send(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert (await client.response())[0] == 200
    assert await client.rest() == b""


async def test_stream_that_nobody_reads_is_cut_off_and_its_work_stopped() -> None:
    """The kernel's buffers fill, then ours, then the provider waits; after the write limit it is stopped."""
    async with serving(server={"limits": LIMITS}, pieces=["x" * 50_000], repeat=1000) as served:
        client = await served.connect()
        await client.post(CHAT_PATH, {**CHAT, "stream": True})
        await served.stub.until(stopped=1)
        assert served.stub.steps < 1000


async def test_answer_that_is_taken_slowly_is_not_cut_off(served: Serving) -> None:
    """The limit is on taking nothing; how long a client takes for the whole is its own affair."""
    size = 20_000_000  # more than the kernel's buffers hold

    @served.listener.app.get("/large")
    async def large() -> Response:
        return Response(b"x" * size)

    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", served.listener.port))
        await loop.sock_sendall(client, b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n")
        taken, began = 0, loop.time()
        while data := await loop.sock_recv(client, 1 << 20):
            taken += len(data)
            await asyncio.sleep(0.02)
        assert taken > size
        assert loop.time() - began > 4 * LIMITS["write_timeout_seconds"]


async def test_reset_that_nobody_has_heard_of_does_not_end_the_limits(served: Serving) -> None:
    """The sweep closes a connection that is gone already; failing at it would leave all others without limits."""
    client = await served.connect()
    await client.send(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n")
    while not (unread := [c for c in served.listener.connections if c.phase is Phase.UNREAD]):
        await asyncio.sleep(0)
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.abort()
    while client.writer.get_extra_info("socket").fileno() >= 0:
        await asyncio.sleep(0)
    for connection in unread:
        connection.check(unread[0].due)


async def test_declared_body_over_the_cap_is_refused_unread(served: Serving) -> None:
    """The client learns it before it has sent anything."""
    client = await served.connect()
    await client.send(HEAD + b"content-length: 99999999999999999999\r\n\r\n")
    assert await refused_with(client, 413) == "too_large"


async def test_large_body_is_answered_while_it_is_still_being_sent(served: Serving) -> None:
    """Closing at once would reset the connection, and the client would never read why."""
    client = await served.connect()
    await client.send(HEAD + b"content-length: 3000000\r\n\r\n")
    await client.send(b" " * 3_000_000)
    assert (await client.response())[0] == 413


async def test_undeclared_body_over_the_cap_is_refused_on_the_way(served: Serving) -> None:
    """A chunked body says no size beforehand."""
    client = await served.connect()
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    await client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk * 5)
    assert await refused_with(client, 413) == "too_large"


async def test_flood_of_tiny_chunks_is_refused(served: Serving) -> None:
    """Every chunk costs the same work, so 60,000 bytes in chunks of one cost as much as 15 MB in good ones."""
    client = await served.connect()
    await client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 5_000)
    assert await refused_with(client, 413) == "too_large"


async def test_body_of_declared_length_may_come_in_any_pieces(served: Serving) -> None:
    """How it is cut up is the network's doing, and differs from time to time."""
    body = json.dumps({**CHAT, "model": "stub"}).encode() + b" " * 300
    client = await served.connect()
    await client.send(HEAD + b"content-length: %d\r\n\r\n" % len(body))
    for value in body:
        client.writer.write(bytes([value]))
        for _ in range(5):
            await asyncio.sleep(0)  # the server reads it by itself
    assert (await client.response())[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        b"x: " + b"a" * 5_000 + b"\r\n\r\n",
        b"x: " + b"a" * 500_000,
        b"".join(b"x-%d: a\r\n" % n for n in range(200)) + b"\r\n",
        b"".join(b"x-%d: a\r\n" % n for n in range(1_000)) + b"\r\n",
    ],
    ids=["one large", "one endless", "200 lines", "1,000 lines"],
)
async def test_too_many_headers_are_refused(served: Serving, headers: bytes) -> None:
    """Whether they come whole or not."""
    client = await served.connect()
    await client.send(b"GET /version HTTP/1.1\r\nhost: localhost\r\n" + headers)
    assert await refused_with(client, 431) == "headers_too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        b"GET /version HTTP/1.1\r\n\r\n",
        b"GET /version HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /version HTTP/1.1\r\nhost: localhost\r\nx y: z\r\n\r\n",
        b"GET /version HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /version HTTP/9.9\r\nhost: localhost\r\n\r\n",
    ],
    ids=lambda data: repr(data[-24:]),
)
async def test_what_is_not_http_gets_a_problem_and_a_close(served: Serving, data: bytes) -> None:
    """Parse errors have the same body as all others; what follows such a request cannot be told from its rest."""
    client = await served.connect()
    await client.send(data)
    status, headers, body = await client.response()
    assert (status, headers["connection"]) == (400, "close")
    check_problem(json.loads(body), status)


async def test_bad_chunk_in_the_middle_of_a_body_ends_the_request(served: Serving) -> None:
    """The handler waits for more when the fault is found."""
    client = await served.connect()
    await client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\n    \r\n")
    while not served.listener.app.traffic.running:
        await asyncio.sleep(0)
    await client.send(b"zz\r\n")
    assert await refused_with(client, 400) == "bad_request"
    assert served.stub.steps == 0


async def test_pipelined_requests_are_answered_in_order(served: Serving) -> None:
    """One at a time, each in full."""
    client = await served.connect()
    requests = [b"GET /%s HTTP/1.1\r\nhost: localhost\r\nx-request-id: r%d\r\n\r\n" % (p, n)
                for n, p in enumerate([b"version", b"nope", b"health/live"] * 20)]  # fmt: skip
    await client.send(b"".join(requests))
    for number in range(60):
        status, headers, _ = await client.response()
        assert headers["x-request-id"] == f"r{number}"
        assert status == (200, 404, 200)[number % 3]


async def test_half_closed_connection_counts_as_left(served: Serving) -> None:
    """No HTTP client closes its half and then reads on; those that did it meant to leave."""
    served.stub.permits = asyncio.Semaphore(1)
    client = await served.connect()
    await client.post(CHAT_PATH, {**CHAT, "stream": True})
    await served.stub.until(steps=1)
    client.writer.write_eof()
    await served.stub.until(stopped=1)


async def test_expect_continue_is_answered_before_the_body(served: Serving) -> None:
    """curl waits for it before it sends a large body."""
    body = json.dumps(CHAT).encode()
    client = await served.connect()
    await client.send(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body))
    assert (await client.response())[0] == 100
    await client.send(body)
    assert (await client.response())[0] == 200


@pytest.mark.parametrize(
    "limit", [{"max_connections": 20}, {"max_connections_per_address": 20}], ids=["in all", "per address"]
)
async def test_connections_past_the_cap_are_turned_away(limit: dict[str, Any]) -> None:
    """With 503 and Retry-After, and only until others close."""
    async with serving(server={"limits": LIMITS | limit | {"header_timeout_seconds": 60}}) as served:
        held = [await served.connect() for _ in range(20)]
        while len(served.listener.connections) < 20:
            await asyncio.sleep(0)
        status, headers, body = await (await served.connect()).response()
        assert (status, headers["retry-after"]) == (503, "5")
        check_problem(json.loads(body), 503)
        for client in held:
            client.abort()
        while len(served.listener.connections):
            await asyncio.sleep(0)
        assert (await served.client.get("/health/live")).status_code == 200


async def test_hoard_of_one_address_leaves_room_for_others() -> None:
    """A cap in all alone would let one client lock out everyone."""
    limits = LIMITS | {"max_connections": 60, "max_connections_per_address": 50, "header_timeout_seconds": 60}
    async with serving(server={"limits": limits}) as served:
        for _ in range(60):
            await served.connect("127.0.0.2")
        while len(served.listener.connections) < 50:
            await asyncio.sleep(0)
        assert (await served.client.post(CHAT_PATH, json=CHAT)).status_code == 200


async def test_probe_is_served_while_slow_clients_hold_on(served: Serving) -> None:
    """Fifty connections of each kind of slowness, and a client that never notices."""
    openings = [
        b"",
        b"GET / HT",
        b"GET /version HTTP/1.1\r\nhost: localhost\r\nx: ",
        HEAD + b"content-length: 500\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n \r\n",
        b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"x" * 10_000,
    ]
    clients = []
    for opening in openings:
        for _ in range(50):
            client = await served.connect("127.0.0.2")
            await client.send(opening)
            clients.append(client)
    for _ in range(20):
        assert (await served.client.post(CHAT_PATH, json=CHAT)).status_code == 200
    for client in clients:
        await client.rest()  # every one is closed by the server
