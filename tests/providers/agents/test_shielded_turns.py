"""Shields at their four places in a turn, plain and streamed: nothing unshielded is emitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llama_stack.apis.agentic_system import (
    AgenticSystemTurn,
    ModelInferenceStep,
    ToolExecutionStep,
)
from llama_stack.apis.common import Message
from llama_stack.shields import SHIELD_ERROR
from tests.providers.agents.stage import MISBEHAVING, REFUSED, call, kinds, stage

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def shout(text: str) -> str:
    return text.upper()


def tool_results(turn: AgenticSystemTurn) -> list[Any]:
    return [r.content for step in turn.steps if isinstance(step, ToolExecutionStep) for r in step.tool_responses]


@both
@pytest.mark.parametrize("hidden", [0, 1])
async def test_an_input_shield_stops_a_turn_before_the_model_sees_it(hidden: int, streamed: bool) -> None:
    """Each new message is judged, not only the last: an attack could stand in front of a harmless one."""
    said = ["a bomb", "hello"] if hidden else ["hello", "a bomb"]
    async with stage(shields_in=["word:secret", "word:bomb"]) as on:
        turn = await on.turn(*said, streamed=streamed)
    assert kinds(turn) == ["!word:bomb"]
    assert turn.response_message == Message.assistant(REFUSED)
    assert on.model.requests == []


@both
async def test_many_new_messages_are_judged_a_few_at_a_time(streamed: bool) -> None:
    """A client can send thousands: they must not all wait in memory, nor be judged after an objection."""
    messages = [*["hello"] * 100, "a bomb", *["hello"] * 1000]
    async with stage(shields_in=["word:bomb"]) as on:
        turn = await on.turn(*messages, streamed=streamed)
    assert kinds(turn) == ["!word:bomb"]
    assert len(on.safety.judged) <= 101 + 16
    assert on.safety.most_at_once <= 16


@both
@pytest.mark.parametrize("place", ["shields_in", "shields_out", "tool_shields_in", "tool_shields_out"])
@pytest.mark.parametrize("order", [["raises", "word:bomb"], ["word:bomb", "raises"], ["word:secret", "word:bomb"]])
async def test_shields_that_disagree_are_an_objection(place: str, order: list[str], streamed: bool) -> None:
    """One that is content outvotes nobody, at any of the four places; the first in order is told."""
    shields: dict[str, Any] = {place: order}
    said = "A bomb?" if place == "shields_in" else "Go"
    async with stage(["a bomb ", call("shout", text="bomb")], ["never"], tools=[echo_as_shout()], **shields) as on:
        turn = await on.turn(said, streamed=streamed)
    first = SHIELD_ERROR if order[0] == "raises" else "word:bomb"
    assert kinds(turn)[-1] == f"!{first}"
    assert len(on.model.requests) == (0 if place == "shields_in" else 1)


def echo_as_shout() -> Callable[..., Any]:
    def shout(text: str) -> str:
        return text

    return shout


@both
@pytest.mark.parametrize("place", ["shields_in", "shields_out", "tool_shields_in", "tool_shields_out"])
async def test_a_slow_shield_is_waited_for(place: str, streamed: bool) -> None:
    """Nothing passes it meanwhile; within its time it is a shield like any other."""
    shields: dict[str, Any] = {place: ["slow:bomb"]}
    said = "A bomb?" if place == "shields_in" else "Go"
    async with stage(["a bomb ", call("shout", text="bomb")], ["never"], tools=[echo_as_shout()], **shields) as on:
        turn = await on.turn(said, streamed=streamed)
    assert kinds(turn)[-1] == "!slow:bomb"
    told = "".join(chunk.model_dump_json() for chunk in on.chunks) + turn.model_dump_json(exclude={"user_messages"})
    assert ("a bomb " in told) == place.startswith("tool")
    assert len(on.model.requests) == (0 if place == "shields_in" else 1)


@both
async def test_what_a_shield_stopped_is_no_part_of_a_later_prompt(streamed: bool) -> None:
    """Else the next turn would let it in."""
    async with stage(["Hi."], shields_in=["word:bomb"]) as on:
        first = await on.turn("a bomb", streamed=streamed)
        await on.turn("Hello", history=[first], streamed=streamed)
    assert on.prompt()[1:] == [Message.user("Hello")]


@both
async def test_an_output_shield_lets_nothing_of_an_objection_out(streamed: bool) -> None:
    """The forbidden word comes last and in two pieces; a stream must not have sent it."""
    async with stage(["Take ", "a ", "bo", "mb"], shields_out=["word:bomb"], config={"window_characters": 5}) as on:
        turn = await on.turn("How?", streamed=streamed)
    assert kinds(turn) == ["model", "!word:bomb"]
    assert turn.response_message.content == REFUSED
    assert "mb" not in "".join(chunk.response_text_delta or "" for chunk in on.chunks)
    step = turn.steps[0]
    assert isinstance(step, ModelInferenceStep)
    assert step.text == ("Take " if streamed else "")


@both
async def test_an_output_shield_that_is_content_shows_as_a_step(streamed: bool) -> None:
    """And the text is whole."""
    pieces = ["All ", "is ", "well", "."]
    async with stage(pieces, shields_out=["word:bomb"], config={"window_characters": 5}) as on:
        turn = await on.turn("How?", streamed=streamed)
    assert kinds(turn) == ["model", "safety"]
    assert turn.response_message.content == "All is well."


@both
async def test_an_output_shield_judges_calls_for_the_client(streamed: bool) -> None:
    """Arguments are output like any other."""
    async with stage([call("post", text="bomb")], client_tools=["post"], shields_out=["word:bomb"]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "!word:bomb"]
    assert turn.response_message.tool_calls == []
    assert not any(chunk.tool_call for chunk in on.chunks)


@both
async def test_a_tool_s_input_shield_stops_the_call(streamed: bool) -> None:
    """It is judged before it is made."""
    made: list[str] = []

    def note(text: str) -> str:
        made.append(text)
        return "ok"

    async with stage([call("note", text="bomb")], tools=[note], tool_shields_in=["word:bomb"]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "!word:bomb"]
    assert made == []


@both
async def test_a_tool_s_output_shield_keeps_its_answer_from_model_and_client(streamed: bool) -> None:
    """A page that carries an attack reaches nobody."""

    def tell(key: str) -> str:
        return f"the {key} secret"

    async with stage([call("tell", key="x")], tools=[tell], tool_shields_out=["word:secret"]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "tool", "!word:secret"]
    assert tool_results(turn) == []
    assert len(on.model.requests) == 1


@both
async def test_shields_of_tools_that_are_content_show_as_steps(streamed: bool) -> None:
    """Four places, each with its step."""
    async with stage(
        [call("add", a=1, b=2)],
        ["3."],
        tools=[add],
        shields_in=["word:bomb"],
        shields_out=["word:bomb"],
        tool_shields_in=["word:bomb"],
        tool_shields_out=["word:bomb"],
    ) as on:
        turn = await on.turn("1 + 2?", streamed=streamed)
    assert kinds(turn) == ["safety", "model", "safety", "safety", "tool", "safety", "model", "safety"]


@both
@pytest.mark.parametrize("kind", MISBEHAVING)
@pytest.mark.parametrize("place", ["shields_in", "shields_out", "tool_shields_in", "tool_shields_out"])
async def test_a_shield_without_a_verdict_stops_the_turn(place: str, kind: str, streamed: bool) -> None:
    """At each of the four places: nothing unshielded is emitted."""
    shields: dict[str, Any] = {place: [kind]}
    async with stage(
        ["said ", call("shout", text="xyz")],
        ["never"],
        tools=[shout],
        config={"shield_timeout_seconds": 0.05},
        **shields,
    ) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn)[-1] == f"!{SHIELD_ERROR}"
    assert "canary" not in turn.model_dump_json()
    told = "".join(chunk.model_dump_json() for chunk in on.chunks) + turn.model_dump_json()
    assert ("said " in told) == place.startswith("tool")
    assert "XYZ" not in told
