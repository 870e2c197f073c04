"""From what a request says to prompts of token ids that fit the model, or to an error that points into the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from llama_stack.apis.common import Attachment, Content, Dialog, Message, Role, ToolDefinition
from llama_stack.errors import ContextLengthError, DrainingError, FieldFault, InvalidRequestError

from .serving import LoadedModel

_INLINE_CHARACTERS = 2_000
"""Longer requests are encoded in a thread, so that the event loop is never held."""
_SHORT_CHARACTERS = 100_000
"""Longer ones take their turns in one thread of their own, so that a flood of them leaves the processor to others."""


@dataclass(frozen=True)
class _Part:
    """One prompt to be encoded."""

    pointer: str
    """Where it stands in the request's body."""
    characters: int
    encode: Callable[[], list[int]]


class PromptEncoder:
    """Encodes the prompts of requests off the event loop. ``close`` ends its thread."""

    def __init__(self) -> None:
        self._long_prompts = ThreadPoolExecutor(1, "long prompts")
        self._is_closed = False

    async def close(self) -> None:
        """Refuse the prompts that wait, with ``DrainingError``; return when the one under way is done."""
        self._is_closed = True
        await asyncio.to_thread(self._long_prompts.shutdown)

    async def texts(self, model: LoadedModel, contents: Sequence[tuple[str, Content]]) -> list[list[int]]:
        """The prompts that continue these texts, each given with its JSON pointer. Raises as ``dialogs``."""
        _refuse([fault for pointer, content in contents for fault in _attachments(content, pointer)])
        parts = [
            _Part(pointer, _length(content), partial(model.chat.encode_completion, content))
            for pointer, content in contents
        ]
        return await self._encode(parts, model.engine.context)

    async def dialogs(
        self, model: LoadedModel, dialogs: Sequence[tuple[str, Dialog]], tools: Sequence[ToolDefinition]
    ) -> list[list[int]]:
        """The prompts that answer these dialogs, each given with its JSON pointer.

        All of them are checked before any is returned. Raises ``InvalidRequestError`` naming every place that holds
        what a text model cannot be told, and ``ContextLengthError`` for the first prompt that leaves no room for an
        answer.
        """
        _refuse([fault for pointer, dialog in dialogs for fault in _dialog_faults(dialog, pointer)])
        # Arguments and tool definitions are objects, whose length as text is not known before they are written.
        unknown = _INLINE_CHARACTERS if tools else 0
        parts = [
            _Part(
                pointer,
                unknown + sum(map(_message_length, dialog.messages)),
                partial(model.chat.encode_dialog, dialog.messages, tools),
            )
            for pointer, dialog in dialogs
        ]
        return await self._encode(parts, model.engine.context)

    async def _encode(self, parts: Sequence[_Part], context: int) -> list[list[int]]:
        def encode_all() -> list[list[int]]:
            self._check_open()
            return [_encode_one(part, context) for part in parts]

        self._check_open()
        characters = sum(part.characters for part in parts) + 50 * len(parts)
        if characters <= _INLINE_CHARACTERS:
            return encode_all()
        if characters <= _SHORT_CHARACTERS:
            return await asyncio.to_thread(encode_all)
        return await asyncio.get_running_loop().run_in_executor(self._long_prompts, encode_all)

    def _check_open(self) -> None:
        if self._is_closed:
            raise DrainingError("the provider is being stopped")


def _encode_one(part: _Part, context: int) -> list[int]:
    try:
        prompt = part.encode()
    except InvalidRequestError as error:
        raise InvalidRequestError(error.detail, faults=[FieldFault(part.pointer, error.code, error.detail)]) from error
    if len(prompt) >= context:
        raise ContextLengthError(len(prompt), context, pointer=part.pointer)
    return prompt


def _refuse(faults: list[FieldFault]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
        raise InvalidRequestError(f"{faults[0].pointer}: {faults[0].detail}{more}", faults=faults)


def _dialog_faults(dialog: Dialog, pointer: str) -> Iterator[FieldFault]:
    for index, message in enumerate(dialog.message_history):
        yield from _message_faults(message, f"{pointer}/message_history/{index}")
    yield from _message_faults(dialog.message, f"{pointer}/message")


def _message_faults(message: Message, pointer: str) -> Iterator[FieldFault]:
    yield from _attachments(message.content, f"{pointer}/content")
    if message.tool_calls and message.role is not Role.ASSISTANT:
        yield FieldFault(
            f"{pointer}/tool_calls", "validation", f"only an assistant calls tools, not role {message.role.value!r}"
        )
    if message.tool_responses and message.role is not Role.TOOL:
        yield FieldFault(
            f"{pointer}/tool_responses",
            "validation",
            f"responses come in a message of role 'tool', not {message.role.value!r}",
        )
    for index, response in enumerate(message.tool_responses):
        yield from _attachments(response.content, f"{pointer}/tool_responses/{index}/content")


def _attachments(content: Content, pointer: str) -> Iterator[FieldFault]:
    parts = content if isinstance(content, list) else [content]
    for index, part in enumerate(parts):
        if isinstance(part, Attachment):
            place = f"{pointer}/{index}" if isinstance(content, list) else pointer
            yield FieldFault(place, "validation", f"an attachment ({part.mime_type}); this model reads text only")


def _message_length(message: Message) -> int:
    if message.tool_calls:
        return _INLINE_CHARACTERS
    return _length(message.content) + sum(_length(response.content) for response in message.tool_responses)


def _length(content: Content) -> int:
    parts = content if isinstance(content, list) else [content]
    return sum(len(part) for part in parts if isinstance(part, str))
