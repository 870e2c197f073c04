"""What a message says, as text."""

from __future__ import annotations

import json

from llama_stack.apis.common import Attachment, Content, Message


def text_of(content: Content) -> str:
    """The texts of a content, one after the other; attachments have none."""
    parts = content if isinstance(content, list) else [content]
    return "".join(part for part in parts if not isinstance(part, Attachment))


def shown(message: Message) -> str:
    """A message for somebody to read: its text, and the calls and results of tools as JSON."""
    calls = [json.dumps(call.model_dump(mode="json"), ensure_ascii=False) for call in message.tool_calls]
    results = [f"{response.tool_name}: {text_of(response.content)}" for response in message.tool_responses]
    return "\n".join(part for part in (text_of(message.content), *calls, *results) if part)
