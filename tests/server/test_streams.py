"""Streams over a real socket: flushed as they come, ended when the client goes, honest when they fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from llama_stack.errors import EngineRestartedError, OverloadedError
from tests.server.serving import CHAT, CHAT_PATH, Serving, check_problem, problem_of, serving

pytestmark = pytest.mark.anyio

STREAM = {**CHAT, "stream": True}
BATCH = {"model": "stub", "batch_dialogs": [CHAT["dialog"]] * 3}
BATCH_PATH = "/inference/batch_chat_completion"


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    async with serving() as found:
        yield found


@pytest.mark.parametrize("accept", ["text/event-stream", "application/jsonl"])
async def test_each_chunk_arrives_before_the_next_is_made(served: Serving, accept: str) -> None:
    """Nothing buffers: the stub takes its next step only when the client has its last one in hand."""
    served.stub.permits = asyncio.Semaphore(1)
    async with served.client.stream("POST", CHAT_PATH, json=STREAM, headers={"accept": accept}) as response:
        seen = 0
        async for line in response.aiter_lines():
            if line:
                seen += 1
                assert served.stub.steps == seen
                served.stub.permits.release()
    assert seen == 4


async def test_each_line_of_a_batch_arrives_before_the_next_is_made(served: Serving) -> None:
    """Spec operation 9: each line is flushed when it is ready."""
    served.stub.permits = asyncio.Semaphore(4)
    async with served.client.stream("POST", BATCH_PATH, json=BATCH) as response:
        seen = 0
        async for line in response.aiter_lines():
            seen += 1
            assert json.loads(line)["content"] == "Hello from the stub."
            assert served.stub.steps == 4 * seen
            for _ in range(4):
                served.stub.permits.release()
    assert seen == 3


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_client_that_leaves_stops_the_work(served: Serving, body: dict[str, Any]) -> None:
    """The work behind a request that nobody waits for would hold a batch slot: streamed or whole, it stops."""
    served.stub.permits = asyncio.Semaphore(2)
    client = await served.connect()
    await client.post(CHAT_PATH, body)
    await served.stub.until(steps=2)
    client.abort()
    await served.stub.until(stopped=1)
    assert served.stub.steps == 2
    assert served.stub.finished == 0


async def test_client_that_leaves_a_batch_stops_the_rest_of_it(served: Serving) -> None:
    """The second dialog is under way when the client goes; the third is never begun."""
    served.stub.permits = asyncio.Semaphore(6)
    client = await served.connect()
    await client.post(BATCH_PATH, BATCH)
    await served.stub.until(steps=6)
    client.close()
    await served.stub.until(stopped=1)
    assert (served.stub.finished, served.stub.steps) == (1, 6)


async def test_client_that_leaves_is_told_apart_in_the_metrics(served: Serving) -> None:
    """A client that left is neither a success nor a failure of ours."""
    served.stub.permits = asyncio.Semaphore(0)
    client = await served.connect()
    await client.post(CHAT_PATH, CHAT)
    while not served.listener.app.traffic.running:
        await asyncio.sleep(0)
    client.abort()
    await served.stub.until(stopped=1)
    while served.listener.app.traffic.running:
        await asyncio.sleep(0)
    metrics = (await served.client.get("/metrics")).text
    assert 'code="client_gone",method="POST",route="/inference/chat_completion",status="499"' in metrics


@pytest.mark.parametrize("stream", [False, True])
async def test_early_error_keeps_its_status(served: Serving, stream: bool) -> None:
    """The first item is taken before the status is sent."""
    served.stub.failure = OverloadedError("the queue is full", retry_after_seconds=7)
    response = await served.client.post(CHAT_PATH, json={**CHAT, "stream": stream})
    assert problem_of(response)["error"]["code"] == "overloaded"
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")


async def test_late_error_is_a_typed_event_and_a_clean_end(served: Serving) -> None:
    """After the first byte the status is spent; a stream that just stops would look like an answer."""
    served.stub.failure, served.stub.fail_at = EngineRestartedError("the engine restarts"), 2
    response = await served.client.post(CHAT_PATH, json=STREAM)
    assert response.status_code == 200
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert [event.startswith("data: ") for event in events] == [True, True, False]
    name, data = events[2].split("\n")
    assert name == "event: error"
    document = json.loads(data.removeprefix("data: "))
    check_problem(document, 503)
    assert document["error"]["code"] == "engine_restarted"


async def test_late_exit_of_a_provider_is_an_event_too(served: Serving) -> None:
    """A provider that wants to end the process ends its stream, in the way that all failures do."""
    served.stub.failure, served.stub.fail_at = SystemExit(3), 2
    response = await served.client.post(CHAT_PATH, json=STREAM)
    check_problem(json.loads(response.text.partition("event: error\ndata: ")[2]), 500)


async def test_late_error_of_a_stream_of_lines_is_its_last_line(served: Serving) -> None:
    """The same, for clients that asked for lines."""
    served.stub.failure, served.stub.fail_at = EngineRestartedError("the engine restarts"), 2
    response = await served.client.post(CHAT_PATH, json=STREAM, headers={"accept": "application/jsonl"})
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert len(lines) == 3
    check_problem(lines[2], 503)


@pytest.mark.parametrize("accept", ["application/jsonl", "application/json"])
async def test_late_error_of_a_list_cuts_the_connection(served: Serving, accept: str) -> None:
    """Spec operation 9: a line is an item and has no room for an error, so a fake one is never sent."""
    served.stub.permits = asyncio.Semaphore(4)
    received = b""
    async with served.client.stream("POST", BATCH_PATH, json=BATCH, headers={"accept": accept}) as response:
        assert response.status_code == 200
        items = response.aiter_bytes()
        while b"}" not in received:
            received += await anext(items)
        served.stub.failure = EngineRestartedError("the engine restarts")
        served.stub.permits.release()
        with pytest.raises(httpx2.RemoteProtocolError):
            await anext(items)
    assert json.loads(received.strip(b"[]\n"))["content"] == "Hello from the stub."


async def test_late_error_of_a_list_is_logged_with_its_cause(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """What is our bug is logged in full, and the reason often stands in what the exception was raised from."""
    served.stub.permits = asyncio.Semaphore(4)
    async with served.client.stream("POST", BATCH_PATH, json=BATCH) as response:
        items = response.aiter_bytes()
        await anext(items)
        served.stub.failure = OSError("what")
        served.stub.failure.__cause__ = KeyError("why")
        served.stub.permits.release()
        with pytest.raises(httpx2.RemoteProtocolError):
            await anext(items)
    assert "KeyError: 'why'" in caplog.text


async def test_late_failures_count_as_failures(served: Serving) -> None:
    """A stream that dies must not count as a success because its status was 200."""
    served.stub.failure, served.stub.fail_at = EngineRestartedError("the engine restarts"), 2
    await served.client.post(CHAT_PATH, json=STREAM)
    metrics = (await served.client.get("/metrics")).text
    assert 'code="engine_restarted",method="POST",route="/inference/chat_completion",status="200"} 1.0' in metrics


async def test_strange_late_error_shows_nothing_of_itself(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """The rule of the status line holds in the middle of a stream too."""
    served.stub.failure, served.stub.fail_at = OSError("canary"), 2
    response = await served.client.post(CHAT_PATH, json=STREAM)
    assert "canary" not in response.text
    assert "internal" in response.text
    assert "canary" in caplog.text


async def test_deadline_before_the_first_byte_is_504(served: Serving) -> None:
    """X-Deadline-Ms: the client will not wait longer, so neither does the work."""
    served.stub.permits = asyncio.Semaphore(0)
    for body in (CHAT, STREAM):
        response = await served.client.post(CHAT_PATH, json=body, headers={"x-deadline-ms": "30"})
        assert problem_of(response)["error"]["code"] == "deadline_exceeded"
        assert response.status_code == 504
    assert served.stub.stopped == 2


async def test_deadline_in_the_middle_of_a_stream_is_an_event(served: Serving) -> None:
    """The deadline is for the whole answer."""
    served.stub.permits = asyncio.Semaphore(2)
    response = await served.client.post(CHAT_PATH, json=STREAM, headers={"x-deadline-ms": "200"})
    assert response.text.count("data: ") == 3
    assert "event: error" in response.text
    assert "deadline_exceeded" in response.text
    assert served.stub.stopped == 1


async def test_deadline_that_is_kept_changes_nothing(served: Serving) -> None:
    """Its timer must not fire into a later request on the same connection."""
    for _ in range(3):
        response = await served.client.post(CHAT_PATH, json=CHAT, headers={"x-deadline-ms": "600000"})
        assert response.status_code == 200


async def test_stream_survives_a_reader_slower_than_its_buffers() -> None:
    """Back-pressure: the provider waits for the socket, and every chunk arrives once and in order."""
    pieces = [f"{number:05d}" + "x" * 20_000 for number in range(400)]
    async with serving(pieces=pieces) as served:
        client = await served.connect()
        await client.post(CHAT_PATH, STREAM)
        taken = 0
        while (
            not any(connection.flow.write_paused for connection in served.listener.connections)
            or served.stub.steps != taken  # the kernels pass on what they hold for a while yet
        ):
            taken = served.stub.steps
            await asyncio.sleep(0.1)
        assert taken < 400
        received = b""
        while b'"finished_ok"' not in received:
            received += await client.reader.read(1 << 20)
        numbers = [part[:5] for part in received.decode().split('"text_delta":"')[1:]]
        assert numbers == [f"{number:05d}" for number in range(400)]


async def test_endless_stream_gives_way_to_others() -> None:
    """An iterator that always has its next item at hand never waits, and the loop would serve nobody else."""
    async with serving(repeat=1_000_000) as served:
        client = await served.connect()
        await client.post(CHAT_PATH, STREAM)
        reading = asyncio.create_task(client.rest())
        await served.stub.until(steps=1)
        for _ in range(5):
            assert (await served.client.get("/health/live")).status_code == 200
        assert served.stub.finished == 0
        client.abort()
        await served.stub.until(stopped=1)
        await reading


async def test_many_streams_at_once_stay_apart(served: Serving) -> None:
    """Each client gets its own chunks in their order."""

    async def one() -> str:
        response = await served.client.post(CHAT_PATH, json=STREAM)
        events = response.text.removesuffix("\n\n").split("\n\n")
        return "".join(json.loads(event.removeprefix("data: "))["text_delta"] for event in events)

    assert await asyncio.gather(*(one() for _ in range(50))) == ["Hello from the stub."] * 50


async def test_storm_of_leaving_clients_leaves_nothing_running(served: Serving) -> None:
    """100 clients leave at once; every answer is stopped, and the next request is served as ever."""
    served.stub.permits = asyncio.Semaphore(0)
    clients = [await served.connect() for _ in range(100)]
    for number, client in enumerate(clients):
        await client.post(CHAT_PATH, STREAM if number % 2 else CHAT)
    while served.listener.app.traffic.running < 100:
        await asyncio.sleep(0.01)
    for client in clients:
        client.abort()
    await served.stub.until(stopped=100)
    served.stub.permits = None
    assert (await served.client.post(CHAT_PATH, json=CHAT)).status_code == 200
    assert served.listener.app.traffic.running == 0
