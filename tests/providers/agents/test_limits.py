"""What ends a turn before its answer, and that nothing is lost or added by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llama_stack.apis.agentic_system import (
    AgenticSystemExecuteRequest,
    ModelInferenceStep,
)
from llama_stack.apis.common import Message, StopReason
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponseStreamChunk
from llama_stack.client import chunks
from llama_stack.errors import (
    UpstreamError,
)
from llama_stack.testing.scripted_inference import Answer, ScriptedInference
from llama_stack.turns import turn_of
from tests.providers.agents.stage import call, kinds, stage

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def shout(text: str) -> str:
    return text.upper()


async def hang() -> str:
    await asyncio.Event().wait()
    return ""


@both
async def test_a_turn_ends_at_its_steps(streamed: bool) -> None:
    """A model that never answers; the last step says which limit it was."""
    endless = [[call("add", a=n, b=n)] for n in range(9)]
    async with stage(*endless, tools=[add], config={"limits": {"steps": 3}}) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "tool"] * 3 + ["!max_steps"]
    assert turn.response_message.content == "I had to stop: the model was asked 3 times."


@both
async def test_a_turn_ends_at_a_call_that_repeats(streamed: bool) -> None:
    """Endless loops mostly make the same call; arguments in another order are the same."""
    calls = [[call("add", a=1, b=1)], [call("add", b=1, a=1)]] * 5
    async with stage(*calls, tools=[add], config={"limits": {"repeats": 2}}) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "tool"] * 2 + ["model", "!repeated_call"]


@both
async def test_a_turn_ends_at_too_many_calls_at_once(streamed: bool) -> None:
    """One answer must not start a thousand tools."""
    many = [call("add", a=n, b=n) for n in range(9)]
    async with stage(many, tools=[add], config={"limits": {"calls": 8}}) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "!max_calls"]


@both
async def test_a_turn_ends_at_its_seconds_wherever_it_is(streamed: bool) -> None:
    """In the middle of an answer that does not come; what was said stays."""
    async with stage(["Well, ", asyncio.Event()], config={"limits": {"seconds": 0.05}}) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "!max_seconds"]
    assert isinstance(turn.steps[0], ModelInferenceStep)
    assert turn.steps[0].text == "Well, "
    assert on.model.stopped == 1


@both
async def test_a_turn_ends_at_its_seconds_while_a_tool_runs(streamed: bool) -> None:
    """The turn's own limit counts also where the tool's is longer."""
    async with stage([call("hang")], tools=[hang], config={"limits": {"seconds": 0.05}}) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "tool", "!max_seconds"]


@both
async def test_a_turn_ends_at_its_tokens_and_keeps_what_was_said(streamed: bool) -> None:
    """An answer that is cut is better than none, and says that it is cut."""
    async with stage(["one ", "two ", "three"], config={"limits": {"tokens": 2}}) as on:
        turn = await on.turn("Count", streamed=streamed)
    assert kinds(turn) == ["model", "!max_tokens"]
    assert turn.response_message.content == "one two "
    if streamed:
        assert on.chunks[-1].stop_reason is StopReason.MAX_TOKENS


@both
async def test_tokens_are_counted_over_all_answers_of_a_turn(streamed: bool) -> None:
    """Each answer gets what the ones before it left; calls cost tokens too, here five for sixteen characters."""
    script: list[Answer] = [["a", "b", call("add", a=1, b=1)], ["c", call("add", a=2, b=2)], ["never"]]
    async with stage(*script, tools=[add], config={"limits": {"tokens": 12}}) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert [request.max_tokens for request in on.model.requests] == [12, 5]
    assert kinds(turn) == ["model", "tool", "model", "tool", "!max_tokens"]


class Heedless(ScriptedInference):
    """Does not care how many tokens it was given."""

    async def chat_completion(self, request: ChatCompletionRequest) -> Any:
        return await super().chat_completion(request.model_copy(update={"max_tokens": 0}))


@both
@pytest.mark.parametrize("shields", [[], ["word:bomb"]], ids=["bare", "shielded"])
@pytest.mark.parametrize("endless", ["text", "calls"])
async def test_a_model_that_goes_on_beyond_its_tokens_is_cut(endless: str, shields: list[str], streamed: bool) -> None:
    """What a remote engine is told it need not heed; a turn's memory is bounded by us."""
    pieces: Answer = ["one "] * 1000 if endless == "text" else [call("add", a=n, b=n) for n in range(1000)]
    config = {"limits": {"tokens": 20, "calls": 1000}}
    async with stage(model=Heedless(pieces), tools=[add], shields_out=shields, config=config) as on:
        turn = await on.turn("Count", streamed=streamed)
    assert kinds(turn) == ["model", "!max_tokens"]
    assert turn.response_message.content == (
        "one " * 20 if endless == "text" else "I had to stop: the model's answer was cut at 20 tokens."
    )
    assert on.model.stopped == 1


@both
async def test_an_answer_that_breaks_off_is_an_error_and_no_answer(streamed: bool) -> None:
    """A connection that closes early must not pass for a model that had no more to say."""

    class Broken(ScriptedInference):
        async def chat_completion(self, request: ChatCompletionRequest) -> Any:
            return self._broken()

        async def _broken(self) -> AsyncIterator[ChatCompletionResponseStreamChunk]:
            yield ChatCompletionResponseStreamChunk(text_delta="The password is")
            yield ChatCompletionResponseStreamChunk(text_delta=" not", stop_reason=StopReason.NOT_STOPPED)

    async with stage(model=Broken()) as on:
        with pytest.raises(UpstreamError, match="before its end"):
            await on.turn("Go", streamed=streamed)


@pytest.mark.parametrize("pieces", range(8, 20))
async def test_a_limit_that_strikes_while_the_reader_is_behind_leaves_a_whole_stream(pieces: int) -> None:
    """Each chunk waits for room then, also the one that starts a step: a step that never started must not end."""
    script: list[Answer] = [[*["x"] * pieces, call("shout", text="x")], ["y"]]
    async with stage(*script, tools=[shout], config={"limits": {"seconds": 0.05}}) as on:
        request = AgenticSystemExecuteRequest(
            agent_uuid="a", messages=[Message.user("Go")], turn_history=[], stream=True
        )
        stream = chunks(await on.provider.execute(request))
        heard = [await anext(stream)]
        await asyncio.sleep(0.15)
        heard += [chunk async for chunk in stream]
    turn = turn_of(request.messages, heard)
    assert kinds(turn)[-1] in ("!max_seconds", "model")
    assert heard[-1].stop_reason is StopReason.FINISHED_OK
