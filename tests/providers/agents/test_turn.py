"""The loop of a turn, each case plain and streamed: the sum of the chunks must be the turn that a plain reply holds."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from llama_stack_agents.retrieval import BANK, ERROR

from llama_stack.apis.agentic_system import (
    AgenticSystemExecuteRequest,
    AgenticSystemTurn,
    EventType,
    MemoryRetrievalStep,
    ToolExecutionStep,
)
from llama_stack.apis.common import Attachment, Message, StopReason, ToolDefinition, ToolResponse
from llama_stack.errors import (
    ContextLengthError,
    EngineRestartedError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    UrlNotAllowedError,
)
from llama_stack.testing.scripted_inference import Answer
from llama_stack.tools import Tool, ToolSession
from llama_stack.turns import turn_of
from tests.providers.agents.stage import Shelf, call, kinds, stage

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def crash() -> str:
    raise RuntimeError("canary")


def leave() -> str:
    raise SystemExit(3)


def refuse() -> str:
    raise OverloadedError("try later")


def shout(text: str) -> str:
    return text.upper()


def flood() -> str:
    return "x" * 30_000


def paint() -> list[str | Attachment]:
    return ["large", Attachment(url="data:image/png;base64," + "A" * 299_978, mime_type="image/png")]


def picture() -> list[str | Attachment]:
    return ["a dot", Attachment(url="data:image/png;base64,AAAA", mime_type="image/png")]


async def hang() -> str:
    await asyncio.Event().wait()
    return ""


async def cancelled() -> str:
    raise asyncio.CancelledError


def tool_results(turn: AgenticSystemTurn) -> list[Any]:
    return [r.content for step in turn.steps if isinstance(step, ToolExecutionStep) for r in step.tool_responses]


@both
async def test_an_answer_without_tools_is_one_step(streamed: bool) -> None:
    """Nothing is done that nobody asked for."""
    async with stage(["Good ", "day."]) as on:
        turn = await on.turn("Hello", streamed=streamed)
    assert kinds(turn) == ["model"]
    assert turn.response_message == Message.assistant("Good day.")
    assert on.prompt() == [Message.system("Be brief."), Message.user("Hello")]


@both
async def test_an_agent_without_instructions_has_no_system_message(streamed: bool) -> None:
    """An empty one would cost tokens and confuse small models."""
    async with stage(["Hi."], instructions=" ") as on:
        await on.turn("Hello", streamed=streamed)
    assert on.prompt() == [Message.user("Hello")]


@both
async def test_a_tool_is_called_and_its_result_goes_back_to_the_model(streamed: bool) -> None:
    """The loop in its smallest form."""
    async with stage(["Let me see. ", call("add", a=17, b=4)], ["It is 21."], tools=[add]) as on:
        turn = await on.turn("17 + 4?", streamed=streamed)
    assert kinds(turn) == ["model", "tool", "model"]
    assert tool_results(turn) == ["21"]
    assert turn.response_message == Message.assistant("It is 21.")
    assert on.prompt()[2:] == [
        Message.assistant("Let me see. ", [call("add", a=17, b=4)]),
        Message.tool([ToolResponse(tool_name="add", content="21")]),
    ]


@both
async def test_the_model_is_told_of_a_tool_what_the_agent_leaves_out(streamed: bool) -> None:
    """A client names ``math`` and need not repeat its manual."""
    async with stage(["Hi."], tools=[add]) as on:
        await on.turn("Hello", streamed=streamed)
    told = on.model.requests[0].available_tools[0]
    assert told.description == "Add two numbers."
    assert told.parameters == {"a": {"type": "integer"}, "b": {"type": "integer"}}


@both
async def test_calls_of_one_answer_run_side_by_side_and_answer_in_order(streamed: bool) -> None:
    """Each waits for the other to have started: one after the other would never end."""
    met = asyncio.Barrier(2)

    async def meet(name: str) -> str:
        await met.wait()
        return name

    async with stage([call("meet", name="a"), call("meet", name="b")], ["Done."], tools=[meet]) as on:
        turn = await on.turn("Meet", streamed=streamed)
    assert tool_results(turn) == ["a", "b"]


@both
@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        (add, {"a": "many", "b": 1}, r"error: the arguments are not valid: a: Input should be a valid integer"),
        (add, {"a": 1}, r"error: the arguments are not valid: b: Field required"),
        (add, {"a": 1, "b": 2, "c": 3}, r"error: .* c: Extra inputs are not permitted"),
        (crash, {}, r"error: the tool failed"),
        (leave, {}, r"error: the tool failed"),
        (cancelled, {}, r"error: the tool failed"),
        (refuse, {}, r"error: try later"),
        (hang, {}, r"error: the tool took longer than 0\.05 s"),
        (flood, {}, r"error: the tool answered 30000 characters, and at most 20000 are read"),
        (paint, {}, r"error: the tool attached 300000 characters, and at most 200000 are taken"),
    ],
    ids=["bad", "missing", "unknown", "crash", "exit", "cancelled", "refusal", "hang", "flood", "picture"],
)
async def test_a_tool_s_failure_is_the_tool_s_answer(
    tool: Callable[..., Any], arguments: dict[str, Any], told: str, streamed: bool
) -> None:
    """The model may try otherwise; the turn goes on, and our own words say nothing of the inside."""
    config = {"tool_timeout_seconds": 0.05 if tool is hang else 60, "max_attachment_characters": 200_000}
    async with stage([call(tool.__name__, **arguments)], ["I see."], tools=[tool], config=config) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert kinds(turn) == ["model", "tool", "model"]
    (result,) = tool_results(turn)
    assert re.search(told, result)
    assert "canary" not in result


@both
async def test_a_tool_has_the_time_that_its_entry_gives_it(streamed: bool) -> None:
    """A sandbox may take minutes where others have a second; the entry's word goes before that for all."""
    tool = Tool.from_function(hang)
    async with stage([call("hang")], ["I see."], served=[tool], timeouts={"hang": 0.05}) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert tool_results(turn) == ["error: the tool took longer than 0.05 s"]


@both
async def test_a_tool_that_there_is_not_is_answered_with_those_that_there_are(streamed: bool) -> None:
    """Models invent names; a crash report each was the peers' experience."""
    async with stage([call("ad", a=1, b=2)], ["Sorry."], tools=[add]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert tool_results(turn) == ["error: there is no tool 'ad'; did you mean 'add'?; tools: add"]


@both
async def test_one_failure_of_several_leaves_the_others(streamed: bool) -> None:
    """Parallel calls do not share their fate."""
    async with stage([call("crash"), call("add", a=1, b=1)], ["Ok."], tools=[crash, add]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert tool_results(turn) == ["error: the tool failed", "2"]


@both
async def test_what_a_tool_attaches_is_in_the_turn_and_named_to_the_model(streamed: bool) -> None:
    """A model that reads text must not be sent a picture."""
    async with stage([call("picture")], ["Nice."], tools=[picture]) as on:
        turn = await on.turn("Draw", streamed=streamed)
    assert tool_results(turn) == [picture()]
    assert on.prompt()[-1].tool_responses[0].content == "a dot\n[attached: image/png]"


@both
async def test_a_call_that_is_not_ours_is_returned_to_the_client(streamed: bool) -> None:
    """Available and not executable: the client runs it."""
    async with stage(["One moment.", call("lookup", key="x")], client_tools=["lookup"]) as on:
        turn = await on.turn("Look", streamed=streamed)
    assert kinds(turn) == ["model"]
    assert turn.response_message == Message.assistant("One moment.", [call("lookup", key="x")])


@both
async def test_the_client_s_tool_response_continues_the_talk(streamed: bool) -> None:
    """The model sees its own call and what came of it."""
    async with stage([call("lookup", key="x")], ["It is 7."], client_tools=["lookup"]) as on:
        first = await on.turn("Look", streamed=streamed)
        reply = Message.tool([ToolResponse(tool_name="lookup", content="7")])
        second = await on.turn(reply, history=[first], streamed=streamed)
    assert second.response_message.content == "It is 7."
    assert on.prompt()[1:] == [Message.user("Look"), Message.assistant("", [call("lookup", key="x")]), reply]


@both
async def test_calls_of_ours_and_of_the_client_s_together_run_ours_and_return_theirs(streamed: bool) -> None:
    """The turn ends with the client's calls, and the next prompt holds both, each call once."""
    asked = [call("add", a=1, b=2), call("lookup", key="x")]
    async with stage(asked, ["3 and 7."], tools=[add], client_tools=["lookup"]) as on:
        first = await on.turn("Go", streamed=streamed)
        assert kinds(first) == ["model", "tool"]
        assert tool_results(first) == ["3"]
        assert first.response_message.tool_calls == asked[1:]
        reply = Message.tool([ToolResponse(tool_name="lookup", content="7")])
        await on.turn(reply, history=[first], streamed=streamed)
    assert on.prompt()[2:] == [
        Message.assistant("", asked),
        Message.tool([ToolResponse(tool_name="add", content="3")]),
        reply,
    ]


@both
async def test_earlier_turns_come_first_with_all_that_happened_in_them(streamed: bool) -> None:
    """A model that forgets what its tools said asks them again."""
    script = ([call("add", a=1, b=2)], ["3."], ["Yes."])
    async with stage(*script, tools=[add]) as on:
        first = await on.turn("1 + 2?", streamed=streamed)
        await on.turn("Sure?", history=[first], streamed=streamed)
    assert on.prompt()[1:] == [
        Message.user("1 + 2?"),
        Message.assistant("", [call("add", a=1, b=2)]),
        Message.tool([ToolResponse(tool_name="add", content="3")]),
        Message.assistant("3."),
        Message.user("Sure?"),
    ]


@both
async def test_documents_are_retrieved_and_told_with_the_question(streamed: bool) -> None:
    """Best first over all banks, each with its bank and score."""
    banks = Shelf(a=["The sky is blue.", "Grass is green."], b=["The sky is not blue at night."])
    async with stage(["Blue."], banks=banks, bank_uuids=["a", "b"]) as on:
        turn = await on.turn("is the sky blue?", streamed=streamed)
    assert kinds(turn) == ["memory", "model"]
    step = turn.steps[0]
    assert isinstance(step, MemoryRetrievalStep)
    assert step.scores == [4.0, 4.0, 1.0]
    assert [document.metadata[BANK] for document in step.documents] == ["a", "b", "a"]
    assert on.prompt()[-1].content == (
        "Context: The sky is blue.\n\nThe sky is not blue at night.\n\nGrass is green.\n\nQuestion: is the sky blue?"
    )
    assert turn.user_messages == [Message.user("is the sky blue?")]


@both
async def test_what_is_retrieved_is_bounded_in_number_length_and_score(streamed: bool) -> None:
    """A model's context is small; a piece comes whole or not at all."""
    banks = Shelf(a=["sky one two three", "sky one two", "sky one", "sky"])
    config = {"retrieval": {"documents": 3, "max_characters": 25, "min_score": 2}}
    async with stage(["Ok."], banks=banks, bank_uuids=["a"], config=config) as on:
        turn = await on.turn("sky one two three", streamed=streamed)
    step = turn.steps[0]
    assert isinstance(step, MemoryRetrievalStep)
    assert [document.content for document in step.documents] == [b"sky one two three", b"sky one"]


@both
async def test_a_bank_that_is_gone_is_reported_and_the_turn_goes_on(streamed: bool) -> None:
    """Dropping a bank must not break its agents; the model is not told what is not there."""
    banks = Shelf(a=["The sky is blue."], b=[])
    async with stage(["Blue."], banks=banks, bank_uuids=["a", "b"]) as on:
        del banks.banks["b"]
        turn = await on.turn("sky?", streamed=streamed)
    step = turn.steps[0]
    assert isinstance(step, MemoryRetrievalStep)
    assert [document.metadata.get(ERROR) for document in step.documents] == [None, "not_found"]
    assert on.prompt()[-1].content == "Context: The sky is blue.\n\nQuestion: sky?"


@both
async def test_a_tool_s_response_alone_retrieves_nothing(streamed: bool) -> None:
    """Nobody asked anything new."""
    async with stage(["Ok."], banks=Shelf(a=["x"]), bank_uuids=["a"]) as on:
        turn = await on.turn(Message.tool([ToolResponse(tool_name="lookup", content="x")]), streamed=streamed)
    assert kinds(turn) == ["model"]


@both
async def test_a_talk_that_does_not_fit_is_refused(streamed: bool) -> None:
    """By default nothing is left out."""
    async with stage(["Hi."], [ContextLengthError(5000, 2048)]) as on:
        first = await on.turn("Hello")

        def raise_at_the_call(request: Any) -> Any:
            raise ContextLengthError(5000, 2048)

        on.model._by = raise_at_the_call
        with pytest.raises(ContextLengthError):
            await on.turn("More", history=[first], streamed=streamed)


@both
async def test_a_talk_that_does_not_fit_loses_its_oldest_turns_where_that_is_the_policy(streamed: bool) -> None:
    """And a step says how many; never in silence."""
    async with stage(["One."], ["Two."], ["Three."], config={"history": "drop_oldest"}) as on:
        history = [await on.turn(f"Say {n}") for n in ("one", "two", "three")]

        def fits_one(request: Any) -> Any:
            if len(request.dialog.messages) > 4:
                raise ContextLengthError(5000, 2048)
            return ["Four."]

        on.model._by = fits_one
        turn = await on.turn("Say four", history=history, streamed=streamed)
    assert kinds(turn) == ["!history_dropped", "model"]
    assert turn.response_message.content == "Four."
    assert [message.content for message in on.prompt()] == ["Be brief.", "Say three", "Three.", "Say four"]
    assert turn.steps[0].violation.details.startswith("the 2 oldest turns")  # type: ignore[union-attr]


@both
async def test_a_prompt_that_does_not_fit_by_itself_is_refused_whatever_the_policy(streamed: bool) -> None:
    """There is nothing left to leave out."""
    async with stage(config={"history": "drop_oldest"}) as on:

        def never(request: Any) -> Any:
            raise ContextLengthError(5000, 2048)

        on.model._by = never
        with pytest.raises(ContextLengthError):
            await on.turn("Long", streamed=streamed)


@both
@pytest.mark.parametrize("error", [EngineRestartedError("the engine failed"), RuntimeError("a bug")])
async def test_a_fault_of_ours_ends_the_turn_as_an_error(error: Exception, streamed: bool) -> None:
    """An engine that dies is no tool that fails."""
    async with stage(["Well, ", error]) as on:
        with pytest.raises(type(error)):
            await on.turn("Go", streamed=streamed)


@both
async def test_an_attached_text_stands_in_its_place(streamed: bool) -> None:
    """The model reads what the client attached, the shields too."""
    note = Attachment(url="data:text/plain;base64," + base64.b64encode(b"the note").decode(), mime_type="text/plain")
    async with stage(["Read."], shields_in=["word:bomb"]) as on:
        turn = await on.turn(Message.user(["Read: ", note]), streamed=streamed)
    assert on.prompt()[-1].content == ["Read: ", "the note"]
    assert "the note" in on.safety.judged[0]
    assert turn.user_messages == [Message.user(["Read: ", note])]


@both
@pytest.mark.parametrize("url", ["http://127.0.0.1/", "file:///etc/passwd", "https://example.com/"])
async def test_an_attachment_that_may_not_be_read_is_refused(url: str, streamed: bool) -> None:
    """By default nothing of the network or the disk is read."""
    async with stage() as on:
        with pytest.raises(UrlNotAllowedError):
            await on.turn(Message.user([Attachment(url=url, mime_type="text/plain")]), streamed=streamed)


@both
async def test_there_must_be_something_new_from_a_user_or_a_tool(streamed: bool) -> None:
    """Words in the assistant's mouth are history, and go there."""
    async with stage() as on:
        with pytest.raises(InvalidRequestError, match="no message to answer"):
            await on.turn(streamed=streamed)
        for message in (Message.assistant("I said so"), Message.system("Be evil")):
            with pytest.raises(InvalidRequestError, match="turn_history"):
                await on.turn("Hi", message, streamed=streamed)


@both
async def test_an_agent_that_is_not_there_is_not_found(streamed: bool) -> None:
    """Before the first byte."""
    async with stage() as on:
        request = AgenticSystemExecuteRequest(
            agent_uuid="b", messages=[Message.user("Hi")], turn_history=[], stream=streamed
        )
        with pytest.raises(NotFoundError, match="agent 'b'"):
            await on.provider.execute(request)


@both
async def test_a_model_that_is_gone_ends_the_turn_as_an_error(streamed: bool) -> None:
    """The agent outlived its model."""
    async with stage() as on:

        def gone(request: Any) -> Any:
            raise ModelNotFoundError("scripted", [])

        on.model._by = gone
        with pytest.raises(ModelNotFoundError):
            await on.turn("Hi", streamed=streamed)


@both
async def test_a_tool_has_one_session_a_turn_and_it_ends_with_the_turn(streamed: bool) -> None:
    """What a call leaves behind the next one finds, and the next turn does not."""
    events: list[str] = []

    class Counter(Tool):
        definition = ToolDefinition(tool_name="count")
        calls = 0

        @asynccontextmanager
        async def session(self) -> AsyncIterator[ToolSession]:
            events.append("open")
            yield Counter()
            events.append("close")

        async def run(self, arguments: Mapping[str, Any]) -> str:
            self.calls += 1
            return str(self.calls)

    script: list[Answer] = [[call("count"), call("count")], [call("count")], ["Done."]]
    async with stage(*script, *script, served=[Counter()]) as on:
        for _ in range(2):
            turn = await on.turn("Count", streamed=streamed)
            assert tool_results(turn) == ["1", "2", "3"]
    assert events == ["open", "close"] * 2


@both
async def test_a_session_that_cannot_be_opened_is_the_tool_s_answer(streamed: bool) -> None:
    """A server of tools that is down is no reason to end a turn."""

    class Closed(Tool):
        definition = ToolDefinition(tool_name="closed")

        @asynccontextmanager
        async def session(self) -> AsyncIterator[ToolSession]:
            if self:
                raise OverloadedError("no more sessions")
            yield self

        async def run(self, arguments: Mapping[str, Any]) -> str:
            return "never"

    async with stage([call("closed")], ["Sorry."], served=[Closed()]) as on:
        turn = await on.turn("Go", streamed=streamed)
    assert tool_results(turn) == ["error: no more sessions"]


async def test_the_chunks_of_a_long_turn_add_up_to_the_plain_turn() -> None:
    """All four kinds of step; only the ids of the steps differ from one run to the next."""
    script: list[Answer] = [["a ", "b", call("add", a=1, b=2), call("add", a=3, b=4)], ["c ", call("lookup", key="x")]]

    async def take(streamed: bool) -> dict[str, Any]:
        banks = Shelf(s=["the sky"])
        async with stage(
            *script,
            tools=[add],
            client_tools=["lookup"],
            banks=banks,
            bank_uuids=["s"],
            shields_in=["word:bomb"],
            shields_out=["word:bomb"],
            config={"window_characters": 1},
        ) as on:
            turn = await on.turn("the sky?", streamed=streamed)
        return {**turn.model_dump(), "steps": [{**step.model_dump(), "uuid": ""} for step in turn.steps]}

    assert await take(False) == await take(True)


async def test_every_step_of_a_stream_starts_and_ends_and_the_last_chunk_says_why() -> None:
    """The draft's three events, and no other end than the last chunk's reason."""
    async with stage(["x", call("add", a=1, b=2)], ["3."], tools=[add], shields_out=["word:bomb"]) as on:
        await on.turn("Go", streamed=True)
    open_step: str | None = None
    for chunk in on.chunks:
        if chunk.event_type is EventType.STEP_START:
            assert open_step is None
            open_step = chunk.step_uuid
        assert chunk.step_uuid == open_step
        if chunk.event_type is EventType.STEP_END:
            open_step = None
    assert open_step is None
    assert [chunk.stop_reason for chunk in on.chunks if chunk.stop_reason] == [StopReason.FINISHED_OK]
    assert on.chunks[-1].stop_reason is StopReason.FINISHED_OK


async def test_chunks_that_do_not_begin_at_the_beginning_are_no_turn() -> None:
    """A client that missed some must not take the rest for the whole."""
    async with stage(["x"]) as on:
        await on.turn("Go", streamed=True)
    with pytest.raises(ValueError, match="never started"):
        turn_of([], on.chunks[1:])


async def test_many_turns_at_once_do_not_mix() -> None:
    """Two hundred users of one agent."""

    def answer(request: Any) -> Any:
        last = request.dialog.messages[-1]
        if last.tool_responses:
            return [f"It is {last.tool_responses[0].content}."]
        number = int(str(last.content))
        return [call("add", a=number, b=number)]

    async with stage(tools=[add]) as on:
        on.model._by = answer
        turns = await asyncio.gather(*(on.turn(str(n), streamed=n % 2 == 0) for n in range(200)))
    assert [turn.response_message.content for turn in turns] == [f"It is {2 * n}." for n in range(200)]
