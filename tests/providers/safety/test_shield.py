"""What holds for every shield: parameters, failing closed, time limits, and the test at the start."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from llama_stack_safety import NoParams, Shield, ShieldProvider, ShieldSettings, started, text_of

from llama_stack.apis import Config
from llama_stack.apis.common import Attachment, Message, ShieldConfig, ToolCall, ToolResponse
from llama_stack.apis.safety import RunShieldRequest, Violation
from llama_stack.errors import InvalidRequestError, NotFoundError, OverloadedError, ProviderStartError
from llama_stack.shields import SHIELD_ERROR

pytestmark = pytest.mark.anyio


class WordParams(Config):
    """What is forbidden."""

    word: str = "bad"


class WordShield(Shield[WordParams]):
    """A stranger's shield."""

    shield_type = "word"
    defaults = WordParams()
    known_good = Message.user("good")
    known_bad = Message.user("bad")

    async def judge(self, messages: Sequence[Message], params: WordParams) -> Violation | None:
        if params.word in text_of(messages[-1]):
            return Violation(violation_type="word", details=params.word)
        return None


class BrokenShield(Shield[NoParams]):
    """Does not do what it should."""

    shield_type = "broken"
    defaults = NoParams()
    known_good = Message.user("good")
    known_bad = Message.user("bad")

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    async def judge(self, messages: Sequence[Message], params: NoParams) -> Violation | None:
        if self.error:
            raise self.error
        await asyncio.Event().wait()
        raise AssertionError("never reached")


def asked(text: str, shield_type: str = "word", **params: Any) -> RunShieldRequest:
    shield = ShieldConfig(shield_type=shield_type, params=params)
    return RunShieldRequest(messages=[Message.user(text)], shield=shield)


async def test_a_stranger_s_shield_judges_and_the_operator_s_refusal_is_suggested() -> None:
    """What an agent answers in place of what was objected to is the operator's to word."""
    provider = await started(WordShield(), ShieldSettings(refusal="No."))
    assert (await provider.run_shield(asked("good"))).violation is None
    violation = (await provider.run_shield(asked("a bad word"))).violation
    assert violation == Violation(violation_type="word", details="bad", suggested_user_response="No.")


async def test_a_request_s_parameters_are_laid_over_the_operator_s() -> None:
    """Each shield validates its own parameters."""
    provider = await started(WordShield(), ShieldSettings())
    assert (await provider.run_shield(asked("bad", word="ugly"))).violation is None
    assert (await provider.run_shield(asked("ugly", word="ugly"))).violation is not None


async def test_parameters_that_the_shield_does_not_take_are_refused_with_their_place() -> None:
    """A misspelt parameter that is ignored is a shield that does not do what its user thinks."""
    provider = await started(WordShield(), ShieldSettings())
    with pytest.raises(InvalidRequestError, match="it takes: word") as refused:
        await provider.run_shield(asked("good", wrod="ugly"))
    assert [fault.pointer for fault in refused.value.faults] == ["/shield/params/wrod"]


async def test_another_shield_and_an_empty_dialog_are_refused() -> None:
    """No verdict is invented for what was not judged."""
    provider = await started(WordShield(), ShieldSettings())
    with pytest.raises(NotFoundError, match="provided: word"):
        await provider.run_shield(asked("good", "llama_guard"))
    with pytest.raises(InvalidRequestError, match="no message"):
        await provider.run_shield(RunShieldRequest(messages=[], shield=ShieldConfig(shield_type="word", params={})))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("canary"), "see the server's log"),
        (OverloadedError("the queue is full"), "the queue is full"),
        (SystemExit(3), "see the server's log"),
        (None, "longer than 0.05 s"),
    ],
    ids=["raises", "unavailable", "exits", "hangs"],
)
async def test_no_verdict_is_an_objection_unless_the_operator_allows_it(error: BaseException | None, told: str) -> None:
    """Fail closed, and say so; failing open is a decision that is written down."""
    blocking = ShieldProvider(BrokenShield(error), ShieldSettings(timeout_seconds=0.05))
    violation = (await blocking.run_shield(asked("good", "broken"))).violation
    assert violation is not None
    assert violation.violation_type == SHIELD_ERROR
    assert told in violation.details
    assert "canary" not in violation.details
    allowing = ShieldProvider(BrokenShield(error), ShieldSettings(timeout_seconds=0.05, on_error="allow"))
    assert (await allowing.run_shield(asked("good", "broken"))).violation is None


@pytest.mark.parametrize("junk", [False, "safe", {}, 0])
async def test_junk_is_no_verdict(junk: Any) -> None:
    """Not even junk that looks like a permission."""

    class Odd(WordShield):
        async def judge(self, messages: Sequence[Message], params: WordParams) -> Violation | None:
            result: Violation | None = junk
            return result

    violation = (await ShieldProvider(Odd(), ShieldSettings()).run_shield(asked("good"))).violation
    assert violation is not None
    assert violation.violation_type == SHIELD_ERROR


async def test_parameters_are_checked_also_where_there_is_nothing_to_judge() -> None:
    """Whoever creates an agent learns then that a shield of it could judge nothing."""
    provider = await started(WordShield(), ShieldSettings())
    cases: list[tuple[dict[str, Any], str]] = [({}, "messages"), ({"wrod": "ugly"}, "params")]
    for params, wrong in cases:
        with pytest.raises(InvalidRequestError) as refused:
            await provider.run_shield(
                RunShieldRequest(messages=[], shield=ShieldConfig(shield_type="word", params=params))
            )
        assert refused.value.param == wrong


async def test_a_cancelled_judgement_is_cancelled_and_no_verdict() -> None:
    """A client that leaves must not be answered for."""
    provider = ShieldProvider(BrokenShield(), ShieldSettings())
    task = asyncio.create_task(provider.run_shield(asked("good", "broken")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_shield_that_lets_its_known_bad_input_pass_does_not_start() -> None:
    """A guard that points at the wrong thing is otherwise noticed by nobody."""

    class Blind(WordShield):
        known_bad = Message.user("something else")

    with pytest.raises(ProviderStartError, match=r"let its known-bad input 'something else' pass"):
        await started(Blind(), ShieldSettings())


async def test_a_shield_that_objects_to_its_known_good_input_does_not_start() -> None:
    """A guard that blocks everything would stop every agent."""

    class Touchy(WordShield):
        known_good = Message.user("not bad")

    with pytest.raises(ProviderStartError, match="objected to its known-good input"):
        await started(Touchy(), ShieldSettings())


async def test_a_shield_without_a_verdict_does_not_start_whatever_on_error_says() -> None:
    """``allow`` is for a guard that worked and is down, not for one that never worked."""
    with pytest.raises(ProviderStartError, match="no verdict on its known-bad input"):
        await started(BrokenShield(OSError("canary")), ShieldSettings(on_error="allow"))


async def test_readiness_says_how_the_test_came_out() -> None:
    """An operator sees that the guard was tried."""
    provider = await started(WordShield(), ShieldSettings())
    assert "objected to the known-bad input" in provider.readiness_details()["self_test"]
    assert ShieldProvider(WordShield(), ShieldSettings()).readiness_details()["self_test"] == "not run"


def test_the_text_of_a_message_is_all_that_it_says() -> None:
    """What hides in a call or in a tool's answer reaches the model like any other text."""
    picture = Attachment(url="data:image/png;base64,AAAA", mime_type="image/png")
    page = Attachment(url="https://example.com/a", mime_type="text/html")
    call = ToolCall(tool_name="run", arguments={"code": "a\nb", "n": 3})
    assert text_of(Message.assistant(["one", picture, page], [call])) == (
        "one\n[image/png]\nhttps://example.com/a\nrun\na\nb\n3"
    )
    assert text_of(Message.tool([ToolResponse(tool_name="t", content=["x", "y"])])) == "x\ny"
