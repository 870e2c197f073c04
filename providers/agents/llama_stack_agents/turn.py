"""One turn of an agent: input shields, retrieval, and then inference and tools in turn until there is an answer.

::

    input shields ─▶ retrieval ─▶ inference ─▶ output shields ─▶ no calls, or calls for the client ─▶ end
                                     ▲                │ calls that are ours
                                     └─ tools, between their own shields

Whatever stops the turn before an answer (a shield, a limit) is its last step: a safety step with a violation, whose
suggestion is the answer. A tool's failure is the tool's answer. What else is raised ends the turn as an error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from llama_stack.apis import Inference, MemoryBanks, Safety
from llama_stack.apis.agentic_system import (
    AgenticSystemCreateRequest,
    AgenticSystemExecuteRequest,
    AgenticSystemTurn,
    StepType,
)
from llama_stack.apis.common import (
    Attachment,
    Content,
    Dialog,
    Message,
    ShieldConfig,
    StopReason,
    ToolCall,
    ToolResponse,
)
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponseStreamChunk
from llama_stack.apis.safety import Violation
from llama_stack.errors import ContextLengthError
from llama_stack.fetch import Fetcher
from llama_stack.shields import Withheld, objection
from llama_stack.tools import Tools

from .config import AgentsConfig, HistoryPolicy
from .history import messages_of
from .retrieval import question_of, retrieve, with_context
from .tool_calls import Toolbox, call_key
from .transcript import Emit, Transcript

HISTORY_DROPPED = "history_dropped"
"""The ``violation_type`` of the step that says that turns were left out; it stops nothing."""


@dataclass(frozen=True)
class Services:
    """What agents work with."""

    config: AgentsConfig
    inference: Inference
    safety: Safety | None
    banks: MemoryBanks | None
    tools: Tools
    fetcher: Fetcher


class Stopped(Exception):
    """The turn is to end with this violation."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.details)
        self.violation = violation


@dataclass
class _Said:
    """What the model wrote in one inference step."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    stop_reason: StopReason = StopReason.FINISHED_OK


class TurnLoop:
    """Takes one turn and tells its chunks to ``emit``."""

    def __init__(
        self, services: Services, agent: AgenticSystemCreateRequest, emit: Emit, *, window_characters: int | None
    ) -> None:
        self._services = services
        self._limits = services.config.limits
        self._agent = agent
        self._toolbox = Toolbox(agent, services.tools, services.config)
        self._transcript = Transcript(emit)
        self._window = window_characters
        self._tokens = 0
        self._made: Counter[str] = Counter()

    async def run(self, request: AgenticSystemExecuteRequest) -> None:
        """Take the turn to its end. Raises what inference, banks and attachments raise."""
        reason = StopReason.FINISHED_OK
        deadline = asyncio.timeout(self._limits.seconds)
        try:
            async with self._toolbox, deadline:
                reason = await self._take(request)
        except Stopped as stopped:
            reason = await self._stop(stopped.violation)
        except TimeoutError:
            if not deadline.expired():
                raise
            reason = await self._stop(_limit("max_seconds", f"the turn took longer than {self._limits.seconds:g} s"))
        await self._transcript.finish(reason)

    async def _take(self, request: AgenticSystemExecuteRequest) -> StopReason:
        history = list(request.turn_history)
        messages = [await self._read(message) for message in request.messages]
        before = messages_of(history)
        await self._judge_each([(self._agent.input_shields, before + messages[: n + 1]) for n in range(len(messages))])
        messages = await self._retrieve(messages)
        for _ in range(self._limits.steps):
            said = await self._infer(history, messages)
            ours = [call for call in said.calls if not self._toolbox.is_for_client(call)]
            if not ours:
                return said.stop_reason
            responses = await self._execute(ours, messages)
            if len(ours) < len(said.calls):
                return said.stop_reason
            messages += [Message.assistant(said.text, said.calls), Message.tool(responses)]
        raise Stopped(_limit("max_steps", f"the model was asked {self._limits.steps} times"))

    async def _stop(self, violation: Violation) -> StopReason:
        """Make the violation the last step."""
        if self._transcript.open_step not in (None, StepType.SAFETY_FILTERING):
            await self._transcript.end()
        if self._transcript.open_step is None:
            await self._transcript.start(StepType.SAFETY_FILTERING)
        await self._transcript.end(violation=violation)
        return StopReason.MAX_TOKENS if violation.violation_type == "max_tokens" else StopReason.FINISHED_OK

    async def _judge_each(self, judgements: Sequence[tuple[Sequence[ShieldConfig], Sequence[Message]]]) -> None:
        """A safety step over messages, each by its own shields; none where there is no shield. Stops the turn."""
        if any(shields for shields, _ in judgements):
            await self._transcript.start(StepType.SAFETY_FILTERING)
            await self._require_no_objection(judgements)
            await self._transcript.end()

    async def _require_no_objection(
        self, judgements: Sequence[tuple[Sequence[ShieldConfig], Sequence[Message]]]
    ) -> None:
        verdicts = await asyncio.gather(*(self._judged(shields, messages) for shields, messages in judgements))
        for violation in verdicts:
            if violation is not None:
                raise Stopped(violation)

    async def _judged(self, shields: Sequence[ShieldConfig], messages: Sequence[Message]) -> Violation | None:
        if not shields:
            return None
        seconds = self._services.config.shield_timeout_seconds
        safety = self._services.safety
        if safety is None:  # it was there when the agent was created
            return Violation(violation_type="shield_error", details="this distribution serves no shields any more")
        return await objection(safety, shields, messages, timeout_seconds=seconds)

    async def _retrieve(self, messages: list[Message]) -> list[Message]:
        banks, question = self._services.banks, question_of(messages)
        if banks is None or not self._agent.memory_bank_uuids or not question.strip():
            return messages
        await self._transcript.start(StepType.MEMORY_RETRIEVAL)
        settings = self._services.config.retrieval
        documents = await retrieve(banks, self._agent.memory_bank_uuids, question, settings)
        for document in documents:
            await self._transcript.add(retrieved_document=document)
        await self._transcript.end()
        return with_context(messages, documents)

    async def _infer(self, history: list[AgenticSystemTurn], messages: Sequence[Message]) -> _Said:
        if self._tokens >= self._limits.tokens:
            raise Stopped(_limit("max_tokens", f"the model wrote {self._tokens} tokens"))
        said = _Said()
        async with AsyncExitStack() as stack:
            stream = await stack.enter_async_context(aclosing(await self._asked(history, messages)))
            await self._transcript.start(StepType.MODEL_INFERENCE)
            if self._agent.output_shields:
                await self._hear_withheld(stream, said, messages)
            else:
                async for chunk in stream:
                    self._note(said, chunk)
                    await self._tell(chunk.text_delta)
            for call in filter(self._toolbox.is_for_client, said.calls):
                await self._transcript.add(tool_call=call)
            await self._transcript.end()
        if self._agent.output_shields:
            await self._transcript.start(StepType.SAFETY_FILTERING)
            await self._transcript.end()
        if said.stop_reason is StopReason.MAX_TOKENS:
            raise Stopped(_limit("max_tokens", f"the model's answer was cut at {self._tokens} tokens", said.text))
        self._count(said.calls)
        return said

    async def _asked(self, history: list[AgenticSystemTurn], messages: Sequence[Message]) -> Any:
        """The model's answer as it comes; where the policy says so, turns that do not fit leave ``history``."""
        dropped = 0
        while True:
            prompt = [_readable(message) for message in (*self._system(), *messages_of(history), *messages)]
            request = ChatCompletionRequest(
                model=self._agent.model,
                dialog=Dialog(message=prompt[-1], message_history=prompt[:-1]),
                available_tools=self._toolbox.definitions(),
                max_tokens=self._limits.tokens - self._tokens,
                stream=True,
            )
            try:
                stream = await self._services.inference.chat_completion(request)
            except ContextLengthError:
                if self._services.config.history is HistoryPolicy.REFUSE or not history:
                    raise
                history.pop(0)
                dropped += 1
                continue
            if dropped:
                await self._transcript.start(StepType.SAFETY_FILTERING)
                what = f"the {dropped} oldest turns were left out: the talk did not fit the model's context"
                await self._transcript.end(violation=Violation(violation_type=HISTORY_DROPPED, details=what))
            return cast(AsyncIterator[ChatCompletionResponseStreamChunk], stream)

    async def _hear_withheld(
        self, stream: AsyncIterator[ChatCompletionResponseStreamChunk], said: _Said, context: Sequence[Message]
    ) -> None:
        """Tell what the model writes window by window, each after its judgement. Stops the turn at an objection."""

        async def judge(text: str) -> Violation | None:
            return await self._judged(self._agent.output_shields, [*context, Message.assistant(text, said.calls)])

        withheld = Withheld(judge, window_characters=self._window)
        async for chunk in stream:
            self._note(said, chunk)
            await self._tell(await withheld.add(chunk.text_delta))
            if withheld.violation is not None:
                raise Stopped(withheld.violation)
        await self._tell(await withheld.end())
        if withheld.violation is not None:
            raise Stopped(withheld.violation)

    async def _tell(self, text: str) -> None:
        if text:
            await self._transcript.add(response_text_delta=text)

    def _note(self, said: _Said, chunk: ChatCompletionResponseStreamChunk) -> None:
        said.text += chunk.text_delta
        self._tokens += bool(chunk.text_delta)
        if chunk.tool_call is not None:
            said.calls.append(chunk.tool_call)
        if chunk.stop_reason is StopReason.MAX_TOKENS:
            said.stop_reason = StopReason.MAX_TOKENS

    def _count(self, calls: Sequence[ToolCall]) -> None:
        """Stop the turn at too many calls at once, and at the same call too often."""
        if len(calls) > self._limits.calls:
            what = f"the model asked for {len(calls)} calls at once, and at most {self._limits.calls} are made"
            raise Stopped(_limit("max_calls", what))
        self._made.update(map(call_key, calls))
        for call in calls:
            if self._made[call_key(call)] > self._limits.repeats:
                what = f"the model called {call.tool_name!r} more than {self._limits.repeats} times alike"
                raise Stopped(_limit("repeated_call", what))

    async def _execute(self, calls: Sequence[ToolCall], context: Sequence[Message]) -> list[ToolResponse]:
        """Run calls side by side. What they answer is told when their output shields have let it pass."""
        before = [(self._shields(call, "input"), [*context, Message.assistant("", [call])]) for call in calls]
        await self._judge_each(before)
        await self._transcript.start(StepType.TOOL_EXECUTION)
        for call in calls:
            await self._transcript.add(tool_call=call)
        responses = await asyncio.gather(*map(self._toolbox.run, calls))
        after = [
            (self._shields(call, "output"), [*context, Message.tool([response])])
            for call, response in zip(calls, responses, strict=True)
        ]
        await self._require_no_objection(after)
        for response in responses:
            await self._transcript.add(tool_response_delta=response)
        await self._transcript.end()
        if any(shields for shields, _ in after):
            await self._transcript.start(StepType.SAFETY_FILTERING)
            await self._transcript.end()
        return responses

    def _shields(self, call: ToolCall, side: str) -> Sequence[ShieldConfig]:
        definition = self._toolbox.definition(call)
        if definition is None:
            return ()
        return definition.input_shields if side == "input" else definition.output_shields

    def _system(self) -> list[Message]:
        return [Message.system(self._agent.instructions)] if self._agent.instructions.strip() else []

    async def _read(self, message: Message) -> Message:
        """The message with its attached texts in their places."""
        items = message.content if isinstance(message.content, list) else [message.content]
        if not any(isinstance(item, Attachment) for item in items):
            return message
        return message.model_copy(update={"content": [await self._read_item(item) for item in items]})

    async def _read_item(self, item: str | Attachment) -> str | Attachment:
        if isinstance(item, str) or not _is_text(item.mime_type):
            return item
        fetched = await self._services.fetcher.fetch(item.url)
        return fetched.body.decode("utf-8", errors="replace")


def _limit(kind: str, what: str, answer: str = "") -> Violation:
    return Violation(violation_type=kind, details=what, suggested_user_response=answer or f"I had to stop: {what}.")


def _is_text(mime_type: str) -> bool:
    kind = mime_type.partition(";")[0].strip().lower()
    return kind.startswith("text/") or kind in ("application/json", "application/xml", "application/yaml")


def _readable(message: Message) -> Message:
    """The message for a model that reads text: of what a tool attached it is told the type."""
    if not message.tool_responses:
        return message
    told = [each.model_copy(update={"content": _noted(each.content)}) for each in message.tool_responses]
    return message.model_copy(update={"tool_responses": told})


def _noted(content: Content) -> str:
    items = content if isinstance(content, list) else [content]
    return "\n".join(f"[attached: {item.mime_type}]" if isinstance(item, Attachment) else item for item in items)
