"""What a model is told of earlier turns: the turns that a client sends, as the messages that they were made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llama_stack.apis.agentic_system import (
    AgenticSystemTurn,
    ModelInferenceStep,
    SafetyFilteringStep,
    ToolExecutionStep,
)
from llama_stack.apis.common import Message, ToolCall


def messages_of(turns: Iterable[AgenticSystemTurn]) -> list[Message]:
    """All messages of these turns, in order."""
    return [message for turn in turns for message in _messages(turn)]


def _messages(turn: AgenticSystemTurn) -> list[Message]:
    """A turn's messages; none of one that a shield stopped before the model saw it."""
    inferences = [step for step in turn.steps if isinstance(step, ModelInferenceStep)]
    was_stopped = bool(turn.steps) and _objects(turn.steps[-1])
    if was_stopped and not inferences:
        return []
    messages = list(turn.user_messages)
    for position, step in enumerate(turn.steps):
        if isinstance(step, ModelInferenceStep):
            execution = _execution_after(turn, position)
            is_last = step is inferences[-1]
            asked = turn.response_message.tool_calls if is_last else []
            if execution is not None:
                messages += _called(step.text, execution, asked)
            elif not is_last:
                messages.append(Message.assistant(step.text))
            if is_last and (execution is None or was_stopped):
                messages.append(turn.response_message)
    return messages


def _execution_after(turn: AgenticSystemTurn, position: int) -> ToolExecutionStep | None:
    """The tool execution that belongs to the inference at this position."""
    for step in turn.steps[position + 1 :]:
        if isinstance(step, ModelInferenceStep):
            return None
        if isinstance(step, ToolExecutionStep):
            return step
    return None


def _called(text: str, execution: ToolExecutionStep, asked_of_client: Sequence[ToolCall]) -> list[Message]:
    """The model's calls, those for the client among them, and what came back of those that were run."""
    calls = [*execution.tool_calls, *asked_of_client]
    said = [Message.assistant(text, calls)]
    return [*said, Message.tool(execution.tool_responses)] if execution.tool_responses else said


def _objects(step: object) -> bool:
    return isinstance(step, SafetyFilteringStep) and step.violation is not None
