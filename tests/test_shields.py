"""Running shields: failing closed, and text that leaves only when it has been judged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from llama_stack.apis import Safety
from llama_stack.apis.common import Message, ShieldConfig
from llama_stack.apis.safety import RunShieldRequest, RunShieldResponse, Violation
from llama_stack.errors import OverloadedError
from llama_stack.shields import SHIELD_ERROR, Withheld, objection

pytestmark = pytest.mark.anyio


class Shields(Safety):
    """Shield types that are named for what they do."""

    def __init__(self) -> None:
        self.judged: list[str] = []

    async def shields(self) -> list[str]:
        return ["passes", "objects", "raises", "refuses", "hangs", "forbids"]

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        kind = request.shield.shield_type
        self.judged.append(kind)
        if kind == "raises":
            raise RuntimeError("canary")
        if kind == "refuses":
            raise OverloadedError("the guard's queue is full")
        if kind == "hangs":
            await asyncio.Event().wait()
        if kind == "exits":
            raise SystemExit(3)
        if kind == "cancels":
            raise asyncio.CancelledError
        if kind == "junk":
            return cast(RunShieldResponse, object())
        if kind == "junk inside":
            return RunShieldResponse.model_construct(violation=cast(Any, False))
        if kind == "objects":
            return RunShieldResponse(violation=Violation(violation_type="objects", details="as ever"))
        return RunShieldResponse()


async def judged(*kinds: str, timeout_seconds: float = 30) -> Violation | None:
    shields = [ShieldConfig(shield_type=kind, params={}) for kind in kinds]
    return await objection(Shields(), shields, [Message.user("Hi")], timeout_seconds=timeout_seconds)


async def test_nobody_objects() -> None:
    """Several shields that are content let a message pass."""
    assert await judged("passes", "passes") is None


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("raises", "see the server's log"),
        ("refuses", "the guard's queue is full"),
        ("hangs", "longer than 0.05 s"),
        ("exits", "see the server's log"),
        ("cancels", "see the server's log"),
        ("junk", "no verdict"),
        ("junk inside", "no verdict"),
    ],
)
async def test_a_shield_without_a_verdict_objects(kind: str, told: str) -> None:
    """A guard that is down is the moment at which an attacker would like to be let through."""
    violation = await judged("passes", kind, timeout_seconds=0.05)
    assert violation is not None
    assert violation.violation_type == SHIELD_ERROR
    assert told in violation.details
    assert "canary" not in violation.details


async def test_a_judgement_that_is_cancelled_is_cancelled() -> None:
    """And answered by nobody: a client that leaves must not be told of an objection."""
    task = asyncio.create_task(judged("hangs"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_shields_that_disagree_are_an_objection_and_the_first_in_order_is_told() -> None:
    """One content shield does not outvote another."""
    violation = await judged("passes", "objects", "raises")
    assert violation is not None
    assert violation.violation_type == "objects"


def forbids(word: str) -> tuple[Callable[[str], Awaitable[Violation | None]], list[str]]:
    judged: list[str] = []

    async def judge(text: str) -> Violation | None:
        judged.append(text)
        return Violation(violation_type="word", details=word) if word in text else None

    return judge, judged


@pytest.mark.parametrize("window", [1, 3, 7, 100, None])
async def test_a_forbidden_last_token_never_leaves(window: int | None) -> None:
    """A stream that has sent it cannot take it back, whatever the window."""
    judge, _ = forbids("bomb")
    text = Withheld(judge, window_characters=window)
    pieces = ["how ", "to ", "make ", "a ", "bo", "mb"]
    left = "".join([await text.add(piece) for piece in pieces]) + await text.end()
    assert text.violation is not None
    assert "bomb" not in left
    assert left == text.released
    assert await text.add(" and more") == ""


@pytest.mark.parametrize("window", [1, 3, 7, 100, None])
async def test_what_is_allowed_comes_out_whole_and_in_order(window: int | None) -> None:
    """Holding back must lose nothing."""
    judge, judged = forbids("bomb")
    text = Withheld(judge, window_characters=window)
    pieces = ["a ", "quiet", "", " word"]
    assert "".join([await text.add(piece) for piece in pieces]) + await text.end() == "a quiet word"
    assert judged[-1] == "a quiet word"


async def test_nothing_leaves_before_its_window_is_judged() -> None:
    """The window is what a reader waits for, and what a judge has at least."""
    judge, judged = forbids("bomb")
    text = Withheld(judge, window_characters=10)
    assert await text.add("12345") == ""
    assert judged == []
    assert await text.add("67890") == "1234567890"
    assert judged == ["1234567890"]


async def test_an_empty_text_is_judged_at_its_end() -> None:
    """An answer of tool calls alone has no text, and is an answer."""
    judge, judged = forbids("bomb")
    assert await Withheld(judge, window_characters=10).end() == ""
    assert judged == [""]
