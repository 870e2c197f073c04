"""The steps of a turn as they are told: chunks, in the draft's three events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from llama_stack.apis.agentic_system import AgenticSystemExecuteResponseStreamChunk as Chunk
from llama_stack.apis.agentic_system import EventType, StepType
from llama_stack.apis.common import StopReason

Emit = Callable[[Chunk], Awaitable[None]]


class Transcript:
    """Writes one step after the other to ``emit``.

    The last chunk of a turn carries the reason for its stop, so the end of a step waits until another step starts or
    the turn is finished.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._open: tuple[str, StepType] | None = None
        self._ended: Chunk | None = None

    @property
    def open_step(self) -> StepType | None:
        """The kind of the step that has started and not ended."""
        return self._open[1] if self._open else None

    async def start(self, kind: StepType) -> None:
        """Start a step; the one before it must have ended."""
        assert self._open is None, f"{kind} starts while {self.open_step} is open"
        if self._ended is not None:
            await self._emit(self._ended)
            self._ended = None
        step = (uuid4().hex, kind)
        await self._emit(_chunk(step, EventType.STEP_START))
        self._open = step  # not before: a step whose start was cut off by a time limit has not started

    async def add(self, **parts: Any) -> None:
        """Tell some of the step that is open."""
        await self._emit(_chunk(self._open, EventType.STEP_PROGRESS, **parts))

    async def end(self, **parts: Any) -> None:
        """End the step that is open."""
        self._ended = _chunk(self._open, EventType.STEP_END, **parts)
        self._open = None

    async def finish(self, reason: StopReason) -> None:
        """End the turn."""
        if self._open is not None:
            await self.end()
        if self._ended is not None:
            await self._emit(self._ended.model_copy(update={"stop_reason": reason}))


def _chunk(step: tuple[str, StepType] | None, event: EventType, **parts: Any) -> Chunk:
    assert step is not None, "no step is open"
    uuid, kind = step
    return Chunk(event_type=event, step_uuid=uuid, step_type=kind, **parts)
