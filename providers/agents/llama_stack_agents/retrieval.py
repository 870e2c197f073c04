"""What an agent's banks hold about what a user says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llama_stack.apis import MemoryBanks
from llama_stack.apis.common import Attachment, Content, Message, Role
from llama_stack.apis.memory_banks import MemoryBankDocument, QueryHit, QueryRequest
from llama_stack.errors import NotFoundError
from llama_stack.turns import SCORE

from .config import Retrieval

MAX_QUERY_CHARACTERS = 100_000
"""The longest text that a bank is searched by; of a longer one the beginning stands for the rest."""
BANK = "bank_uuid"
ERROR = "error"


def question_of(messages: Sequence[Message]) -> str:
    """The text of the last message of a user, or nothing."""
    said = next((message for message in reversed(messages) if message.role is Role.USER), None)
    return text_of(said.content) if said is not None else ""


def text_of(content: Content) -> str:
    """The text in a content, without its attachments."""
    items = content if isinstance(content, list) else [content]
    return "".join(item for item in items if isinstance(item, str))


async def retrieve(
    banks: MemoryBanks | None, bank_uuids: Sequence[str], question: str, settings: Retrieval
) -> list[MemoryBankDocument]:
    """The best pieces of all banks, best first, each with its bank and score among its metadata.

    After them stands, for each bank that is gone, a document that says so, under ``error``; ``banks`` is ``None`` where
    all of them are.
    """
    queries = [_query(banks, bank, question, settings) for bank in dict.fromkeys(bank_uuids)]
    tasks = [asyncio.ensure_future(query) for query in queries]
    try:
        found = await asyncio.gather(*tasks)
    finally:  # one that fails does not stop the others by itself
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    pieces = sorted((piece for bank in found for piece in bank if not is_gone(piece)), key=_score, reverse=True)
    kept: list[MemoryBankDocument] = []
    room = settings.max_characters
    for piece in pieces[: settings.documents]:
        length = len(piece.content.decode())
        if length <= room:
            kept.append(piece)
            room -= length
    return [*kept, *(piece for bank in found for piece in bank if is_gone(piece))]


def is_gone(document: MemoryBankDocument) -> bool:
    """Whether it stands for a bank that is gone; documents may have a key ``error`` of their own."""
    return ERROR in document.metadata and document.uuid == document.metadata.get(BANK)


def with_context(messages: Sequence[Message], documents: Sequence[MemoryBankDocument]) -> list[Message]:
    """The messages, the last one of a user told together with what was found."""
    passages = "\n\n".join(each.content.decode("utf-8", "replace") for each in documents if not is_gone(each))
    told = list(messages)
    position = max((index for index, message in enumerate(told) if message.role is Role.USER), default=None)
    if passages and position is not None:
        told[position] = told[position].model_copy(update={"content": _asked(passages, told[position].content)})
    return told


def _asked(passages: str, content: Content) -> Content:
    lead = f"Context: {passages}\n\nQuestion: "
    if isinstance(content, str):
        return lead + content
    return [lead, content] if isinstance(content, Attachment) else [lead, *content]


async def _query(banks: MemoryBanks | None, bank: str, question: str, settings: Retrieval) -> list[MemoryBankDocument]:
    request = QueryRequest(bank_uuid=bank, text=question[:MAX_QUERY_CHARACTERS], k=settings.documents)
    try:
        if banks is None:
            raise NotFoundError(f"bank {bank!r} does not exist here: no memory banks are served any more")
        answer = await banks.query(request)
    except NotFoundError as error:
        return [_document(bank, error.detail, {BANK: bank, SCORE: 0.0, ERROR: error.code})]
    least = settings.min_score
    return [_piece(bank, hit) for hit in answer.hits if least is None or hit.score >= least]


def _piece(bank: str, hit: QueryHit) -> MemoryBankDocument:
    return _document(hit.document_uuid, hit.text, {**hit.metadata, BANK: bank, SCORE: hit.score})


def _document(uuid: str, text: str, metadata: dict[str, object]) -> MemoryBankDocument:
    return MemoryBankDocument.model_validate(
        {"uuid": uuid, "content": text.encode(), "metadata": metadata, "mime_type": "text/plain"}
    )


def _score(piece: MemoryBankDocument) -> float:
    return float(str(piece.metadata[SCORE]))
