"""Sessions of tools, what tools may attach, and the shields of tools that the client runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from llama_stack_agents import tool_calls

from llama_stack.apis.agentic_system import AgenticSystemTurn, ToolExecutionStep
from llama_stack.apis.common import Attachment, Content, Message, ToolDefinition, ToolResponse
from llama_stack.errors import OverloadedError
from llama_stack.shields import SHIELD_ERROR
from llama_stack.testing.scripted_inference import Answer
from llama_stack.tools import Tool, ToolSession
from tests.providers.agents.stage import MISBEHAVING, REFUSED, call, kinds, stage

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


def tool_results(turn: AgenticSystemTurn) -> list[Any]:
    return [r.content for step in turn.steps if isinstance(step, ToolExecutionStep) for r in step.tool_responses]


def add(a: int, b: int) -> int:
    return a + b


class Server(Tool):
    """A tool whose session is opened and closed as a test says."""

    definition = ToolDefinition(tool_name="server")

    def __init__(self, *openings: BaseException | asyncio.Event | None, closing: Any = None) -> None:
        self.openings = list(openings)
        self.closing = closing

    @asynccontextmanager
    async def session(self) -> AsyncIterator[ToolSession]:
        opening = self.openings.pop(0) if self.openings else None
        if isinstance(opening, asyncio.Event):
            await opening.wait()
        elif opening is not None:
            raise opening
        yield self
        if self.closing is not None:
            await self.closing()

    async def run(self, arguments: Mapping[str, Any]) -> Content:
        return "served"


@both
async def test_a_session_that_opens_slowly_keeps_no_other_tool_waiting(streamed: bool) -> None:
    """Calls side by side share nothing but the turn; one server of tools that hangs is one tool that fails."""
    config = {"tool_timeout_seconds": 0.2}
    asked = [call("server"), call("add", a=1, b=2)]
    async with stage(asked, ["Ok."], tools=[add], served=[Server(asyncio.Event())], config=config) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert tool_results(turn) == ["error: the tool took longer than 0.2 s", "3"]


@both
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (OverloadedError("no more sessions"), "error: no more sessions"),
        (RuntimeError("canary"), "error: the tool failed"),
        (SystemExit(3), "error: the tool failed"),
        (asyncio.CancelledError(), "error: the tool's session was cancelled while it was opened"),
    ],
    ids=["refused", "crash", "exit", "cancelled"],
)
async def test_a_session_that_was_not_opened_is_tried_again(fault: BaseException, told: str, streamed: bool) -> None:
    """A server that was down for a moment is not lost for the turn."""
    script = ([call("server")], [call("server")], ["Ok."])
    async with stage(*script, served=[Server(fault)]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert tool_results(turn) == [told, "served"]


@both
async def test_a_session_that_does_not_close_does_not_keep_the_turn(
    streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that heeds no cancellation."""
    monkeypatch.setattr(tool_calls, "CLOSE_SECONDS", 0.05)
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async with stage([call("server")], ["Ok."], served=[Server(closing=stubborn)]) as on:
        turn = await on.turn("Go", streamed=streamed)
        release.set()
    assert turn.response_message.content == "Ok."


@both
async def test_what_tools_attach_is_bounded_over_the_turn(streamed: bool) -> None:
    """Pictures are not counted among the characters that a model reads, and a turn may draw many."""

    def draw(characters: int) -> list[str | Attachment]:
        return ["drawn", Attachment(url="data:," + "A" * (characters - 6), mime_type="image/png")]

    script = ([call("draw", characters=60)], [call("draw", characters=50)], [call("draw", characters=40)], ["Ok."])
    async with stage(*script, tools=[draw], config={"max_tool_attachment_characters": 100}) as on:
        turn = await on.turn("Draw", streamed=streamed)
    told = "error: the tool attached 50 characters, and 40 are left for this turn; ask for less"
    assert tool_results(turn) == [draw(60), told, draw(40)]


@both
async def test_an_input_shield_of_a_client_s_tool_keeps_the_call_back(streamed: bool) -> None:
    """Whoever runs the tool: its shields are the agent's to run."""
    asked: Answer = ["Posting.", call("post", text="bomb")]
    async with stage(asked, client_tools=["post"], tool_shields_in=["word:bomb"]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "!word:bomb"]
    assert turn.response_message == Message.assistant(REFUSED)
    assert not any(chunk.tool_call for chunk in on.chunks)


@both
async def test_an_output_shield_of_a_client_s_tool_judges_what_the_client_sends(streamed: bool) -> None:
    """A page that carries an attack is no better for having been fetched by the client."""
    reply = Message.tool(
        [ToolResponse(tool_name="fetch", content="x"), ToolResponse(tool_name="fetch", content="bomb")]
    )
    script = ([call("fetch", n=1), call("fetch", n=2)], ["never"])
    async with stage(*script, client_tools=["fetch"], tool_shields_out=["word:bomb"]) as on:
        first = await on.turn("Go", streamed=streamed)
        assert kinds(first) == ["model"]
        second = await on.turn(reply, history=[first], streamed=streamed)
    assert kinds(second) == ["!word:bomb"]
    assert len(on.model.requests) == 1


@both
async def test_shields_of_a_client_s_tool_that_are_content_show_as_steps(streamed: bool) -> None:
    """Before the call and before the answer, as with a tool of ours."""
    shields: dict[str, Any] = {"tool_shields_in": ["word:bomb"], "tool_shields_out": ["word:bomb"]}
    async with stage([call("fetch", n=1)], ["Ok."], client_tools=["fetch"], **shields) as on:
        first = await on.turn("Go", streamed=streamed)
        reply = Message.tool([ToolResponse(tool_name="fetch", content="x")])
        second = await on.turn(reply, history=[first], streamed=streamed)
    assert kinds(first) == ["model", "safety"]
    assert first.response_message.tool_calls == [call("fetch", n=1)]
    assert kinds(second) == ["safety", "model"]


@both
@pytest.mark.parametrize("kind", MISBEHAVING)
async def test_a_shield_of_a_client_s_tool_without_a_verdict_stops_the_turn(kind: str, streamed: bool) -> None:
    """The same at this place as at the other four."""
    config = {"shield_timeout_seconds": 0.05}
    async with stage([call("fetch", n=1)], client_tools=["fetch"], tool_shields_in=[kind], config=config) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", f"!{SHIELD_ERROR}"]
    assert turn.response_message.tool_calls == []
    assert not any(chunk.tool_call for chunk in on.chunks)


@both
@pytest.mark.parametrize("limit", [{"calls": 2}, {"repeats": 2}], ids=["calls", "repeats"])
async def test_calls_for_the_client_beyond_a_limit_are_not_told(limit: dict[str, int], streamed: bool) -> None:
    """A client that acts on each chunk would make all of them before it heard of the limit."""
    async with stage([call("post", n=1)] * 3, client_tools=["post"], config={"limits": limit}) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "!max_calls" if "calls" in limit else "!repeated_call"]
    assert not any(chunk.tool_call for chunk in on.chunks)


@both
async def test_two_tools_of_one_server_share_its_session(streamed: bool) -> None:
    """Opened once, though both calls come at once."""
    opened: list[str] = []

    class Two(Server):
        definitions = (ToolDefinition(tool_name="one"), ToolDefinition(tool_name="two"))

        @asynccontextmanager
        async def session(self) -> AsyncIterator[ToolSession]:
            opened.append("x")
            yield self

        async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
            return name

    async with stage([call("one"), call("two"), call("one")], ["Ok."], served=[Two()]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert tool_results(turn) == ["one", "two", "one"]
    assert opened == ["x"]


@both
async def test_a_tool_that_is_served_and_not_the_agent_s_is_not_run(streamed: bool) -> None:
    """A document can make a model ask for anything; the grant was made when the agent was."""
    made: list[str] = []

    class Secret(Server):
        definition = ToolDefinition(tool_name="secret")

        async def run(self, arguments: Mapping[str, Any]) -> Content:
            made.append("x")
            return "canary"

    async with stage([call("secret")], ["Ok."], tools=[add], hidden=[Secret()]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert tool_results(turn) == ["error: there is no tool 'secret'; tools: add"]
    assert made == []
