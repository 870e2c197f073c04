"""A streamed turn put together again: the sum of the chunks is the turn, and this is how they are added.

The draft's chunks have no event for the end of a turn and none for the answer. Both follow from the steps:

* a chunk belongs to the step of its ``step_uuid``; steps stand in the order in which they start;
* ``response_text_delta`` is the text of an inference step; a ``tool_call`` of an inference step is one for the client
  to run, a ``tool_call`` of a tool execution step one that the stack ran, ``tool_response_delta`` what it gave;
* the score of a ``retrieved_document`` is the number under ``score`` in its metadata;
* a turn that ends in an objection is answered with what the objection suggests; any other one with the last text and
  the calls for the client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .apis.agentic_system import (
    AgenticSystemExecuteResponseStreamChunk,
    AgenticSystemTurn,
    EventType,
    MemoryRetrievalStep,
    ModelInferenceStep,
    SafetyFilteringStep,
    Step,
    StepType,
    ToolExecutionStep,
)
from .apis.common import Message
from .shields import REFUSAL

SCORE = "score"
"""The key under which a retrieved document's metadata hold its score."""

_Chunks = list[AgenticSystemExecuteResponseStreamChunk]


def turn_of(
    user_messages: Sequence[Message], chunks: Iterable[AgenticSystemExecuteResponseStreamChunk]
) -> AgenticSystemTurn:
    """The turn that these chunks add up to. Raises ``ValueError`` for chunks that do not begin with a step's start."""
    by_step: dict[str, _Chunks] = {}
    for chunk in chunks:
        if chunk.event_type is EventType.STEP_START:
            by_step[chunk.step_uuid] = []
        if chunk.step_uuid not in by_step:
            raise ValueError(f"step {chunk.step_uuid!r} was never started; the stream is not whole")
        by_step[chunk.step_uuid].append(chunk)
    steps = [_step(uuid, chunks) for uuid, chunks in by_step.items()]
    last_inference = [c for c in by_step.values() if c[0].step_type is StepType.MODEL_INFERENCE][-1:]
    return AgenticSystemTurn(
        user_messages=list(user_messages), steps=steps, response_message=_answer(steps, last_inference)
    )


def _step(uuid: str, chunks: _Chunks) -> Step:
    kind = chunks[0].step_type
    if kind is StepType.MODEL_INFERENCE:
        return ModelInferenceStep(uuid=uuid, text=_text(chunks))
    if kind is StepType.TOOL_EXECUTION:
        return ToolExecutionStep(
            uuid=uuid,
            tool_calls=[chunk.tool_call for chunk in chunks if chunk.tool_call is not None],
            tool_responses=[chunk.tool_response_delta for chunk in chunks if chunk.tool_response_delta is not None],
        )
    if kind is StepType.MEMORY_RETRIEVAL:
        documents = [chunk.retrieved_document for chunk in chunks if chunk.retrieved_document is not None]
        scores = [float(str(document.metadata.get(SCORE, 0))) for document in documents]
        return MemoryRetrievalStep(uuid=uuid, documents=documents, scores=scores)
    return SafetyFilteringStep(
        uuid=uuid, violation=next((c.violation for c in chunks if c.violation is not None), None)
    )


def _answer(steps: Sequence[Step], last_inference: Sequence[_Chunks]) -> Message:
    last = steps[-1] if steps else None
    if isinstance(last, SafetyFilteringStep) and last.violation is not None:
        suggested = last.violation.suggested_user_response
        return Message.assistant(REFUSAL if suggested is None else suggested)
    if not last_inference:
        return Message.assistant()
    chunks = last_inference[0]
    return Message.assistant(_text(chunks), [chunk.tool_call for chunk in chunks if chunk.tool_call is not None])


def _text(chunks: _Chunks) -> str:
    return "".join(chunk.response_text_delta for chunk in chunks if chunk.response_text_delta)
