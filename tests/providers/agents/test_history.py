"""What a model is told of earlier turns, and which of them are left out."""

from __future__ import annotations

import asyncio
from math import ceil, log2
from typing import Any

import pytest

from llama_stack.apis.agentic_system import (
    AgenticSystemTurn,
    MemoryRetrievalStep,
    ModelInferenceStep,
    SafetyFilteringStep,
    Step,
    ToolExecutionStep,
)
from llama_stack.apis.common import Attachment, Message, ToolResponse
from llama_stack.apis.safety import Violation
from llama_stack.errors import ContextLengthError, InvalidRequestError
from tests.providers.agents.stage import REFUSED, Shelf, call, kinds, stage

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


def said(question: str, answer: str) -> AgenticSystemTurn:
    step = ModelInferenceStep(uuid="s", text=answer)
    return AgenticSystemTurn(
        user_messages=[Message.user(question)], steps=[step], response_message=Message.assistant(answer)
    )


@both
@pytest.mark.parametrize("kept", [0, 1, 30, 63])
async def test_as_few_turns_as_possible_are_left_out_and_that_is_found_quickly(kept: int, streamed: bool) -> None:
    """A long talk must not cost a reading of all of it for each turn that goes."""
    history = [said(f"q{n}", f"a{n}") for n in range(64)]
    async with stage(config={"history": "drop_oldest"}) as on:

        def fits(request: Any) -> Any:
            if len(request.dialog.messages) > 2 + 2 * kept:
                raise ContextLengthError(5000, 2048)
            return [f"Of {len(request.dialog.messages)}."]

        on.model._by = fits
        turn = await on.turn("Go", history=history, streamed=streamed)
    assert kinds(turn) == ["!history_dropped", "model"]
    assert turn.response_message.content == f"Of {2 + 2 * kept}."
    assert turn.steps[0].violation.details.startswith(f"the {64 - kept} oldest")  # type: ignore[union-attr]
    assert len(on.model.requests) <= 2 + ceil(log2(64))


@both
async def test_turns_that_were_left_out_stay_out_for_the_rest_of_the_turn(streamed: bool) -> None:
    """A tool's answer makes the prompt longer, not shorter; one step says it once."""
    history = [said(f"q{n}", f"a{n}") for n in range(4)]
    async with stage(tools=[lower], config={"history": "drop_oldest"}) as on:

        def fits(request: Any) -> Any:
            messages = request.dialog.messages
            if sum(message.content in ("a0", "a1", "a2", "a3") for message in messages) > 1:
                raise ContextLengthError(5000, 2048)
            return ["Done."] if messages[-1].tool_responses else [call("lower", text="X")]

        on.model._by = fits
        turn = await on.turn("Go", history=history, streamed=streamed)
    assert kinds(turn) == ["!history_dropped", "model", "tool", "model"]
    assert [message.content for message in on.prompt()][:4] == ["Be brief.", "q3", "a3", "Go"]


def lower(text: str) -> str:
    return text.lower()


@both
async def test_a_talk_of_more_messages_than_a_request_may_have_is_refused_in_words(streamed: bool) -> None:
    """It came in as turns; as messages it is beyond what any model is asked."""
    history = [said("q", "a")] * 5000
    async with stage(["never"]) as on:
        with pytest.raises(InvalidRequestError, match="10002 messages"):
            await on.turn("Go", history=history, streamed=streamed)


@both
@pytest.mark.parametrize("stop", ["tool_shields_out", "seconds"])
async def test_a_call_that_nothing_came_of_is_told_to_no_later_model(stop: str, streamed: bool) -> None:
    """A call without an answer is a dialog that no model was trained on; what was answered instead is told."""
    shields: dict[str, Any] = {"tool_shields_out": ["word:bomb"]} if stop == "tool_shields_out" else {}
    limits = {"limits": {"seconds": 0.1}} if stop == "seconds" else {}
    tool = lower if stop == "tool_shields_out" else never_ends
    async with stage([call(tool.__name__, text="BOMB")], ["Hi."], tools=[tool], config=limits, **shields) as on:
        first = await on.turn("Go", streamed=streamed)
        await on.turn("Hello", history=[first], streamed=streamed)
    answer = REFUSED if stop == "tool_shields_out" else "I had to stop: the turn took longer than 0.1 s."
    assert on.prompt()[1:] == [Message.user("Go"), Message.assistant(answer), Message.user("Hello")]


async def never_ends(text: str) -> str:
    await asyncio.Event().wait()
    return text


@both
async def test_a_turn_that_goes_on_knows_what_its_first_half_retrieved(streamed: bool) -> None:
    """The client's answer says nothing new to search by, and the question was asked with passages."""
    banks = Shelf(a=["The sky is blue."])
    async with stage(
        [call("lookup", key="x")], ["Blue."], client_tools=["lookup"], banks=banks, bank_uuids=["a"]
    ) as on:
        first = await on.turn("the sky?", streamed=streamed)
        asked = on.prompt()[1]
        reply = Message.tool([ToolResponse(tool_name="lookup", content="7")])
        await on.turn(reply, history=[first], streamed=streamed)
    assert asked.content == "Context: The sky is blue.\n\nQuestion: the sky?"
    assert on.prompt()[1:] == [asked, Message.assistant("", [call("lookup", key="x")]), reply]


@both
async def test_what_was_retrieved_for_a_turn_that_was_answered_is_not_told_again(streamed: bool) -> None:
    """The answer stands for it; passages of every turn would fill the context."""
    banks = Shelf(a=["The sky is blue."])
    async with stage(["Blue."], ["Yes."], banks=banks, bank_uuids=["a"]) as on:
        first = await on.turn("the sky?", streamed=streamed)
        await on.turn("Sure?", history=[first], streamed=streamed)
    assert on.prompt()[1:3] == [Message.user("the sky?"), Message.assistant("Blue.")]


@both
async def test_an_attached_text_of_an_earlier_turn_is_still_a_text(streamed: bool) -> None:
    """A client sends the turn back as it was; a model that reads text could not go on with an attachment."""
    note = Attachment(url="data:text/plain,the%20note", mime_type="text/plain")
    async with stage(["Read."], ["Yes."]) as on:
        first = await on.turn(Message.user(["Read: ", note]), streamed=streamed)
        await on.turn("Sure?", history=[first], streamed=streamed)
    assert on.prompt()[1].content == ["Read: ", "the note"]


@both
async def test_a_history_that_no_stack_wrote_is_no_fault_of_ours(streamed: bool) -> None:
    """Turns are the client's word: steps in any order, bytes that are no text, retrieval for nobody."""
    document = {"uuid": "d", "content": b"\xff", "metadata": {}, "mime_type": "text/plain"}
    steps: list[Step] = [
        ToolExecutionStep(uuid="1", tool_calls=[call("x")], tool_responses=[]),
        MemoryRetrievalStep.model_validate({"uuid": "2", "documents": [document], "scores": [1.0]}),
        ModelInferenceStep(uuid="3", text="a"),
        ToolExecutionStep(uuid="4", tool_calls=[call("x")], tool_responses=[]),
        SafetyFilteringStep(uuid="5", violation=Violation(violation_type="x", details="x")),
        SafetyFilteringStep(uuid="6"),
    ]
    odd = AgenticSystemTurn(
        user_messages=[Message.tool([])], steps=steps, response_message=Message.assistant("b", [call("y")])
    )
    empty = AgenticSystemTurn(user_messages=[], steps=[], response_message=Message.assistant())
    async with stage(["Ok."]) as on:
        turn = await on.turn("Go", history=[odd, empty, odd], streamed=streamed)
    assert turn.response_message.content == "Ok."
