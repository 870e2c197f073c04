"""What a model is told of earlier turns: the turns that a client sends, as the messages that they were made of."""

from __future__ import annotations

from collections.abc import Sequence

from llama_stack.apis.agentic_system import (
    AgenticSystemTurn,
    MemoryRetrievalStep,
    ModelInferenceStep,
    SafetyFilteringStep,
    ToolExecutionStep,
)
from llama_stack.apis.common import Message, ToolCall
from llama_stack.apis.memory_banks import MemoryBankDocument

from .retrieval import with_context


def messages_of(turn: AgenticSystemTurn) -> list[Message]:
    """A turn's messages in order; none of one that a shield stopped before the model saw it."""
    inferences = [step for step in turn.steps if isinstance(step, ModelInferenceStep)]
    was_stopped = bool(turn.steps) and _objects(turn.steps[-1])
    if was_stopped and not inferences:
        return []
    messages = list(turn.user_messages)
    if turn.response_message.tool_calls:  # it goes on with what the client's tools answer, and with what it knew
        messages = with_context(messages, _retrieved(turn))
    for position, step in enumerate(turn.steps):
        if isinstance(step, ModelInferenceStep):
            execution = _execution_after(turn, position)
            is_last = step is inferences[-1]
            if execution is not None and not _was_kept_back(execution):
                messages += _called(step.text, execution, turn.response_message.tool_calls if is_last else [])
            elif not is_last:
                messages.append(Message.assistant(step.text))
            if is_last and (execution is None or was_stopped or _was_kept_back(execution)):
                messages.append(turn.response_message)
    return messages


def _retrieved(turn: AgenticSystemTurn) -> list[MemoryBankDocument]:
    return [document for step in turn.steps if isinstance(step, MemoryRetrievalStep) for document in step.documents]


def _execution_after(turn: AgenticSystemTurn, position: int) -> ToolExecutionStep | None:
    """The tool execution that belongs to the inference at this position."""
    for step in turn.steps[position + 1 :]:
        if isinstance(step, ModelInferenceStep):
            return None
        if isinstance(step, ToolExecutionStep):
            return step
    return None


def _was_kept_back(execution: ToolExecutionStep) -> bool:
    """Whether nothing came of the calls, as where a shield objected: a call without an answer is told to no model."""
    return bool(execution.tool_calls) and not execution.tool_responses


def _called(text: str, execution: ToolExecutionStep, asked_of_client: Sequence[ToolCall]) -> list[Message]:
    """The model's calls, those for the client among them, and what came back of those that were run."""
    return [
        Message.assistant(text, [*execution.tool_calls, *asked_of_client]),
        Message.tool(execution.tool_responses),
    ]


def _objects(step: object) -> bool:
    return isinstance(step, SafetyFilteringStep) and step.violation is not None
