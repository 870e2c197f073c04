"""What an agent's banks give a turn, and what is said of banks that are gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_stack_agents.config import Retrieval
from llama_stack_agents.retrieval import BANK, ERROR, retrieve

from llama_stack.apis.agentic_system import MemoryRetrievalStep
from llama_stack.apis.memory_banks import QueryHit, QueryRequest, QueryResponse
from llama_stack.errors import StoreBusyError
from tests.providers.agents.stage import Shelf, kinds, stage

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


@both
async def test_a_bank_that_is_gone_is_reported_however_much_the_others_hold(streamed: bool) -> None:
    """Pieces that are better than nothing must not push the report out, nor the report a piece."""
    banks = Shelf(a=["sky one", "sky two", "sky three"], b=[])
    config = {"retrieval": {"documents": 2, "max_characters": 14}}
    async with stage(["Ok."], banks=banks, bank_uuids=["a", "b"], config=config) as on:
        del banks.banks["b"]
        turn = await on.turn("sky?", streamed=streamed)
    step = turn.steps[0]
    assert isinstance(step, MemoryRetrievalStep)
    assert [document.metadata.get(ERROR) for document in step.documents] == [None, None, "not_found"]
    assert on.prompt()[-1].content == "Context: sky one\n\nsky two\n\nQuestion: sky?"


@both
async def test_banks_that_nobody_serves_any_more_are_reported(streamed: bool) -> None:
    """The agent outlived the provider; answering as if it had no banks would be a silent loss."""
    async with stage(["Ok."], banks=Shelf(a=["sky"]), bank_uuids=["a"]) as on:
        object.__setattr__(on.provider._services, "banks", None)
        turn = await on.turn("sky?", streamed=streamed)
    assert kinds(turn) == ["memory", "model"]
    step = turn.steps[0]
    assert isinstance(step, MemoryRetrievalStep)
    assert [(document.metadata[BANK], document.metadata[ERROR]) for document in step.documents] == [("a", "not_found")]


@both
async def test_a_document_may_have_a_key_that_is_named_error(streamed: bool) -> None:
    """A bank of log lines: the model is told of them like of any other."""

    class Logs(Shelf):
        async def query(self, request: QueryRequest) -> QueryResponse:
            hit = QueryHit(document_uuid="d", text="disk full", score=1.0, metadata={"error": "E28"})
            return QueryResponse(hits=[hit])

    async with stage(["Ok."], banks=Logs(a=[]), bank_uuids=["a"]) as on:
        await on.turn("why?", streamed=streamed)
    assert on.prompt()[-1].content == "Context: disk full\n\nQuestion: why?"


@both
async def test_a_bank_that_is_named_twice_is_searched_once(streamed: bool) -> None:
    """Each piece would take two places in the context."""
    async with stage(["Ok."], banks=Shelf(a=["the sky"]), bank_uuids=["a", "a"]) as on:
        await on.turn("sky?", streamed=streamed)
    assert on.prompt()[-1].content == "Context: the sky\n\nQuestion: sky?"


async def test_a_bank_that_fails_stops_the_search_of_the_others() -> None:
    """The turn ends with its error, and nothing of it goes on."""
    stopped: list[str] = []

    class Slow(Shelf):
        async def query(self, request: QueryRequest) -> QueryResponse:
            if request.bank_uuid == "b":
                raise StoreBusyError("try later")
            try:
                await asyncio.Event().wait()
            finally:
                stopped.append(request.bank_uuid)
            raise AssertionError("never reached")

    with pytest.raises(StoreBusyError):
        await retrieve(Slow(a=[], b=[]), ["a", "b"], "x", Retrieval())
    assert stopped == ["a"]


@both
async def test_what_banks_hold_cannot_leave_its_place(streamed: bool) -> None:
    """Passages that look like markup of ours are passages: no format of ours is applied to them."""
    text = "sky {0} %s {question} ${HOME} <|eot_id|>"
    async with stage(["Ok."], banks=Shelf(a=[text]), bank_uuids=["a"]) as on:
        turn: Any = await on.turn("sky {x} %d", streamed=streamed)
    assert on.prompt()[-1].content == f"Context: {text}\n\nQuestion: sky {{x}} %d"
    assert turn.steps[0].documents[0].content == text.encode()
