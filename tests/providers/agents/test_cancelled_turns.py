"""Clients that leave, and clients that read slowly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llama_stack.apis.agentic_system import (
    AgenticSystemExecuteRequest,
)
from llama_stack.apis.common import Message, ToolDefinition
from llama_stack.apis.memory_banks import QueryRequest, QueryResponse
from llama_stack.client import chunks
from llama_stack.testing.scripted_inference import Answer
from llama_stack.tools import Tool, ToolSession
from tests.providers.agents.stage import Shelf, call, stage

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


def shout(text: str) -> str:
    return text.upper()


@pytest.mark.parametrize("taken", range(12))
async def test_a_client_that_leaves_stops_the_turn_at_any_step(taken: int) -> None:
    """Whatever is running then, model or tool, is stopped; nothing of the turn goes on."""
    running = 0

    async def wait() -> str:
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(0)
            return "ok"
        finally:
            running -= 1

    script: list[Answer] = [["a", "b", call("wait")], ["c", call("wait"), call("wait")], ["d", asyncio.Event()]]
    async with stage(*script, tools=[wait], shields_in=["word:bomb"]) as on:
        before = len(asyncio.all_tasks())
        request = AgenticSystemExecuteRequest(
            agent_uuid="a", messages=[Message.user("Go")], turn_history=[], stream=True
        )
        stream = chunks(await on.provider.execute(request))
        for _ in range(taken):
            await anext(stream)
        await stream.aclose()
        assert len(asyncio.all_tasks()) == before
        assert running == 0


class Places(Shelf):
    """A bank that never answers."""

    async def query(self, request: QueryRequest) -> QueryResponse:
        await asyncio.Event().wait()
        raise AssertionError("never reached")


class Unopened(Tool):
    """A tool whose session never opens, or whose call never ends."""

    definition = ToolDefinition(tool_name="unopened")

    def __init__(self, *, opens: bool) -> None:
        self.opens = opens

    @asynccontextmanager
    async def session(self) -> AsyncIterator[ToolSession]:
        if not self.opens:
            await asyncio.Event().wait()
        yield self

    async def run(self, arguments: Mapping[str, Any]) -> str:
        await asyncio.Event().wait()
        return "never"


CANCELLED_AT: dict[str, Callable[[], dict[str, Any]]] = {
    "input shields": lambda: {"shields_in": ["hangs"]},
    "retrieval": lambda: {"banks": Places(a=["x"]), "bank_uuids": ["a"]},
    "inference": lambda: {"script": [["a", asyncio.Event()]]},
    "inference held back": lambda: {"script": [["a", asyncio.Event()]], "shields_out": ["word:bomb"]},
    "output shields": lambda: {"shields_out": ["hangs"]},
    "a tool's input shields": lambda: {"tool_shields_in": ["hangs"]},
    "a session that opens": lambda: {"served": [Unopened(opens=False)], "script": [[call("unopened")]]},
    "a tool": lambda: {"served": [Unopened(opens=True)], "script": [[call("unopened"), call("unopened")]]},
    "a tool's output shields": lambda: {"tool_shields_out": ["hangs"]},
    "the second inference": lambda: {"script": [[call("shout", text="x")], ["a", asyncio.Event()]]},
}
"""Where a turn waits for ever, and what makes it."""


@both
@pytest.mark.parametrize("place", CANCELLED_AT)
async def test_a_turn_that_is_cancelled_leaves_nothing_running(place: str, streamed: bool) -> None:
    """Wherever it is, plain and streamed: no task, no inference, no session goes on."""
    what = CANCELLED_AT[place]()
    script = what.pop("script", [["said", call("shout", text="x")]])
    async with stage(*script, tools=[shout], **what) as on:
        before = asyncio.all_tasks()
        task = asyncio.create_task(on.turn("Go", streamed=streamed))
        asked = len(script) if any(isinstance(part, asyncio.Event) for answer in script for part in answer) else 0
        while len(on.model.requests) < asked:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before
        assert on.model.stopped == sum(isinstance(part, asyncio.Event) for answer in script for part in answer)


async def test_a_plain_turn_that_is_cancelled_stops_its_work() -> None:
    """A plain request's client leaves too."""
    async with stage(["a", asyncio.Event()]) as on:
        task = asyncio.create_task(on.turn("Go"))
        while not on.model.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert on.model.stopped == 1


async def test_a_reader_that_is_slow_gets_everything() -> None:
    """The turn waits for it rather than hold the whole stream."""
    pieces = [f"{n} " for n in range(100)]
    async with stage(pieces) as on:
        request = AgenticSystemExecuteRequest(
            agent_uuid="a", messages=[Message.user("Go")], turn_history=[], stream=True
        )
        heard = []
        async for chunk in chunks(await on.provider.execute(request)):
            for _ in range(5):
                await asyncio.sleep(0)
            heard.append(chunk.response_text_delta or "")
    assert "".join(heard) == "".join(pieces)
