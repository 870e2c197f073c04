"""Checks of MemoryBanks. ``llama_stack.testing.memory_banks`` has more, for stores: filters, ranks, formats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from ...apis import MemoryBanks
from ...apis.memory_banks import MemoryBankDocument, QueryMode, QueryRequest
from ...errors import AlreadyExistsError, ConflictError, InvalidRequestError, NotFoundError
from .checks import check, everything, refused
from .subject import Subject


def _document(uuid: str, text: str, **metadata: Any) -> MemoryBankDocument:
    return MemoryBankDocument(uuid=uuid, content=text.encode(), metadata=metadata, mime_type="text/plain")


_OSLO = _document("oslo", "Oslo is the capital of Norway.", country="no")
_ROME = _document("rome", "Rome is the capital of Italy.", country="it")


@asynccontextmanager
async def _bank(subject: Subject, *documents: MemoryBankDocument) -> AsyncIterator[tuple[MemoryBanks, str]]:
    bank = subject.new_id("bank")
    await subject.client.memory_banks.create(bank, "A bank", list(documents))
    try:
        yield subject.client.memory_banks, bank
    finally:
        with suppress(NotFoundError):
            await subject.client.memory_banks.drop(bank)


async def _contents(banks: MemoryBanks, bank: str, *uuids: str) -> list[tuple[str, bytes]]:
    found = await everything(await banks.get_documents(bank, list(uuids)))
    return [(document.uuid, document.content) for document in found]


@check(MemoryBanks)
async def a_bank_is_listed_until_it_is_dropped(subject: Subject) -> None:
    """A bank that was created is in the list with its name, and is gone when it was dropped."""
    async with _bank(subject) as (banks, bank):
        listed = await everything(await banks.list_banks())
        assert (bank, "A bank") in [(b.uuid, b.name) for b in listed], "the bank is not listed"
        assert await banks.drop(bank) == bank, "drop does not answer with the id"
        listed = await everything(await banks.list_banks())
        assert bank not in [b.uuid for b in listed], "the bank is listed after it was dropped"
        await refused(banks.drop(bank), NotFoundError)


@check(MemoryBanks)
async def creating_again_succeeds_with_the_same_request_alone(subject: Subject) -> None:
    """The same request again is a success, and another one of that id is a 409."""
    async with _bank(subject, _OSLO) as (banks, bank):
        await banks.create(bank, "A bank", [_OSLO])
        await refused(banks.create(bank, "Another name", [_OSLO]), AlreadyExistsError, ConflictError)


@check(MemoryBanks)
async def bytes_come_back_as_they_were_sent(subject: Subject) -> None:
    """Documents come back in the order that was asked for, byte by byte, and missing ones are left out."""
    odd = _document("odd", "Ærø \U0001f600 \r\n\ttail  ")
    async with _bank(subject, _OSLO, _ROME, odd) as (banks, bank):
        found = await _contents(banks, bank, "odd", "nobody", "oslo")
        assert found == [("odd", odd.content), ("oslo", _OSLO.content)], f"got {found}"
        assert await _contents(banks, bank) == [], "nothing was asked for"


@check(MemoryBanks)
async def an_insert_is_whole_or_not_at_all(subject: Subject) -> None:
    """An insert with a document that is there already is a 409 and leaves nothing of the others."""
    async with _bank(subject, _OSLO) as (banks, bank):
        await refused(banks.insert(bank, [_ROME, _OSLO]), AlreadyExistsError, ConflictError)
        assert await _contents(banks, bank, "rome") == [], "half of a refused insert is there"
        await banks.insert(bank, [_ROME])
        assert await _contents(banks, bank, "rome") == [("rome", _ROME.content)]


@check(MemoryBanks)
async def an_update_is_whole_or_not_at_all(subject: Subject) -> None:
    """An update of a document that is not there is a 404 and changes nothing of the others."""
    async with _bank(subject, _OSLO) as (banks, bank):
        changed = _document("oslo", "Oslo was called Kristiania.")
        await refused(banks.update(bank, [changed, _ROME]), NotFoundError)
        assert await _contents(banks, bank, "oslo") == [("oslo", _OSLO.content)], "half of a refused update is there"
        await banks.update(bank, [changed])
        assert await _contents(banks, bank, "oslo") == [("oslo", changed.content)]


@check(MemoryBanks)
async def delete_says_what_it_deleted(subject: Subject) -> None:
    """The lines of a delete are the ids that were there, and an empty list deletes nothing."""
    async with _bank(subject, _OSLO, _ROME) as (banks, bank):
        assert await everything(await banks.delete_documents(bank, [])) == []
        assert await everything(await banks.delete_documents(bank, ["rome", "nobody"])) == ["rome"]
        assert [uuid for uuid, _ in await _contents(banks, bank, "oslo", "rome")] == ["oslo"]


@check(MemoryBanks)
async def a_bank_that_is_not_there_is_404(subject: Subject) -> None:
    """Every operation on a bank that does not exist is a 404."""
    banks, bank = subject.client.memory_banks, subject.new_id("no-bank")
    for write in (banks.insert, banks.update):
        await refused(write(bank, [_OSLO]), NotFoundError)
    for named in (banks.get_documents, banks.delete_documents):
        await refused(named(bank, ["oslo"]), NotFoundError)
    await refused(banks.drop(bank), NotFoundError)


@check(MemoryBanks)
async def what_was_answered_outlives_a_restart(subject: Subject) -> None:
    """What was answered with success is there after a restart, and what was deleted is not."""
    bank = subject.new_id("bank")
    await subject.client.memory_banks.create(bank, "Kept", [_OSLO, _ROME])
    await everything(await subject.client.memory_banks.delete_documents(bank, ["rome"]))
    await subject.restart()
    banks = subject.client.memory_banks
    found = [uuid for uuid, _ in await _contents(banks, bank, "oslo", "rome")]
    await banks.drop(bank)
    assert found == ["oslo"], f"after the restart: {found}"


@check(MemoryBanks)
async def writers_at_once_lose_nothing(subject: Subject) -> None:
    """Eight writers of one bank have all their documents in it, and of two with one id exactly one succeeds."""
    async with _bank(subject) as (banks, bank):
        await asyncio.gather(*(banks.insert(bank, [_document(f"d{i}", f"Number {i}.")]) for i in range(8)))
        names = [f"d{i}" for i in range(8)]
        assert [uuid for uuid, _ in await _contents(banks, bank, *names)] == names, "a document is lost"
        same = [banks.insert(bank, [_document("one", f"Writer {i}.")]) for i in range(4)]
        outcomes = await asyncio.gather(*same, return_exceptions=True)
        won = sum(outcome is None for outcome in outcomes)
        assert won == 1, f"{won} of 4 inserts of one id succeeded"
        others = [outcome for outcome in outcomes if outcome is not None]
        assert all(isinstance(other, ConflictError) for other in others), f"the others got {others}"


@check(MemoryBanks)
async def a_query_finds_what_is_there_and_nothing_that_was_deleted(subject: Subject) -> None:
    """A query finds a document as soon as its insert was answered, best first, and not after its delete."""
    async with _bank(subject, _ROME) as (banks, bank):
        await banks.insert(bank, [_OSLO])
        for mode in QueryMode:
            request = QueryRequest(bank_uuid=bank, text="capital of Norway", k=5, mode=mode)
            answer = await banks.query(request)
            assert answer.hits, f"{mode.value}: nothing was found"
            assert answer.hits[0].document_uuid == "oslo", f"{mode.value}: the first is {answer.hits[0].document_uuid}"
            scores = [hit.score for hit in answer.hits]
            assert scores == sorted(scores, reverse=True), f"{mode.value}: the scores do not fall"
        await everything(await banks.delete_documents(bank, ["oslo"]))
        for mode in QueryMode:
            request = QueryRequest(bank_uuid=bank, text="capital of Norway", k=5, mode=mode)
            found = [hit.document_uuid for hit in (await banks.query(request)).hits]
            assert "oslo" not in found, f"{mode.value}: a deleted document was found"


@check(MemoryBanks)
async def a_filter_keeps_out_what_does_not_match(subject: Subject) -> None:
    """A query with a filter finds only documents whose metadata match, and a filter that is none is a 422."""
    async with _bank(subject, _OSLO, _ROME) as (banks, bank):
        request = QueryRequest(bank_uuid=bank, text="capital", k=5, filter={"eq": ["country", "it"]})
        found = {hit.document_uuid for hit in (await banks.query(request)).hits}
        assert found == {"rome"}, f"found {sorted(found)}"
        wrong = QueryRequest(bank_uuid=bank, text="capital", k=5, filter={"like": ["country", "i%"]})
        await refused(banks.query(wrong), InvalidRequestError)
