"""One generated conversation: what the tiny model is trained on, and what it is measured on.

A case is a dialog that ends with the reply wanted. Training labels every reply in it; evaluation gives the model all
but the last message and compares what it writes with ``Case.expects``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llama_stack.apis.common import Message, Role, ToolCall, ToolDefinition, ToolResponse

Skill = Literal["chat", "recall", "passage", "tool_call", "tool_result", "guard", "unknown", "copy", "prose"]


@dataclass(frozen=True)
class Case:
    """A dialog that ends with the assistant's message, and how to tell a right reply from a wrong one."""

    skill: Skill
    messages: tuple[Message, ...]
    tools: tuple[ToolDefinition, ...] = ()
    answer: tuple[str, ...] = ()
    """What the reply must hold, each as whole words; empty when the reply must equal the last message."""
    wrong: tuple[str, ...] = ()
    """What the reply must not hold: the other values that the prompt names."""
    text: str = ""
    """For ``prose``: plain text for a base model to continue; there are no messages then."""

    def expects(self, reply: str, calls: Sequence[ToolCall]) -> bool:
        """Whether a reply, with its tool calls taken out, is right."""
        last = self.messages[-1]
        if list(calls) != list(last.tool_calls):
            return False
        if not self.answer:
            return reply == last.content
        return all(_holds(reply, part) for part in self.answer) and not any(_holds(reply, part) for part in self.wrong)


def _holds(text: str, part: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def system(text: str) -> Message:
    """A system message."""
    return Message(role=Role.SYSTEM, content=text, tool_calls=[], tool_responses=[])


def user(text: str) -> Message:
    """A user message."""
    return Message(role=Role.USER, content=text, tool_calls=[], tool_responses=[])


def assistant(text: str, *calls: ToolCall) -> Message:
    """The assistant's reply: text, tool calls, or both."""
    return Message(role=Role.ASSISTANT, content=text, tool_calls=list(calls), tool_responses=[])


def tool_result(tool_name: str, text: str) -> Message:
    """What a tool gave back."""
    response = ToolResponse(tool_name=tool_name, content=text)
    return Message(role=Role.TOOL, content="", tool_calls=[], tool_responses=[response])
