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
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from llama_stack.apis import Inference, MemoryBanks, Safety
from llama_stack.apis.agentic_system import (
    AgenticSystemCreateRequest,
    AgenticSystemExecuteRequest,
    StepType,
)
from llama_stack.apis.common import (
    MAX_ITEMS,
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
from llama_stack.errors import ContextLengthError, InvalidRequestError, UpstreamError
from llama_stack.fetch import Fetcher
from llama_stack.shields import Withheld, objection
from llama_stack.tools import Tools

from .attachments import AttachmentReader
from .config import AgentsConfig, HistoryPolicy
from .history import messages_of
from .retrieval import question_of, retrieve, with_context
from .tool_calls import Toolbox, call_key
from .transcript import Emit, Transcript

HISTORY_DROPPED = "history_dropped"
"""The ``violation_type`` of the step that says that turns were left out; it stops nothing."""
JUDGED_AT_ONCE = 16
"""How many judgements of a turn run at a time: a client may send thousands of messages."""
CHARACTERS_A_TOKEN = 4
"""What a token of a call is taken to have: of calls no pieces are told that could be counted."""

Judgement = tuple[Sequence[ShieldConfig], Sequence[Message]]
"""Shields, and messages of which they judge the last."""
Stream = Any
"""An iterator of ``ChatCompletionResponseStreamChunk`` that is closed after its use."""


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
    stop_reason: StopReason | None = None
    """``None`` until the model has said why it stopped."""


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
        reader = AttachmentReader(self._services.fetcher, self._services.config.max_attached_bytes)
        past = [[await reader.read(message) for message in messages_of(turn)] for turn in request.turn_history]
        messages = [await reader.read(message) for message in request.messages]
        await self._judge_each(self._judgements_of_new([*chain.from_iterable(past), *messages], len(messages)))
        messages = await self._retrieve(messages)
        for _ in range(self._limits.steps):
            said = await self._infer(past, messages)
            ours = [call for call in said.calls if not self._toolbox.is_for_client(call)]
            if not ours:
                return StopReason.FINISHED_OK
            responses = await self._execute(ours, messages)
            if len(ours) < len(said.calls):
                return StopReason.FINISHED_OK
            messages += [Message.assistant(said.text, said.calls), Message.tool(responses)]
        raise Stopped(_limit("max_steps", f"the model was asked {self._limits.steps} times"))

    def _judgements_of_new(self, messages: Sequence[Message], new: int) -> Iterator[Judgement]:
        """The last ``new`` messages: each by the agent's shields, what a client's tool answered by that tool's too."""
        for end in range(len(messages) - new + 1, len(messages) + 1):
            if self._agent.input_shields:
                yield self._agent.input_shields, messages[:end]
            for response in messages[end - 1].tool_responses:
                shields = self._shields(response.tool_name, "output")
                if shields:
                    yield shields, [*messages[: end - 1], Message.tool([response])]

    async def _stop(self, violation: Violation) -> StopReason:
        """Make the violation the last step."""
        if self._transcript.open_step not in (None, StepType.SAFETY_FILTERING):
            await self._transcript.end()
        if self._transcript.open_step is None:
            await self._transcript.start(StepType.SAFETY_FILTERING)
        await self._transcript.end(violation=violation)
        return StopReason.MAX_TOKENS if violation.violation_type == "max_tokens" else StopReason.FINISHED_OK

    async def _judge_each(self, judgements: Iterable[Judgement]) -> None:
        """A safety step over messages, each by its own shields; none where there is no shield. Stops the turn."""
        needed = (judgement for judgement in judgements if judgement[0])
        first = next(needed, None)
        if first is not None:
            await self._transcript.start(StepType.SAFETY_FILTERING)
            await self._require_no_objection(chain([first], needed))
            await self._transcript.end()

    async def _require_no_objection(self, judgements: Iterable[Judgement]) -> None:
        """Stop the turn at the first objection. Judgements are made up as they are needed, a few at a time."""
        waiting = iter(judgements)
        while some := list(islice(waiting, JUDGED_AT_ONCE)):
            verdicts = await asyncio.gather(*(self._judged(shields, messages) for shields, messages in some))
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
        bank_uuids, question = self._agent.memory_bank_uuids, question_of(messages)
        if not bank_uuids or not question.strip():
            return messages
        await self._transcript.start(StepType.MEMORY_RETRIEVAL)
        documents = await retrieve(self._services.banks, bank_uuids, question, self._services.config.retrieval)
        for document in documents:
            await self._transcript.add(retrieved_document=document)
        await self._transcript.end()
        return with_context(messages, documents)

    async def _infer(self, past: list[list[Message]], messages: Sequence[Message]) -> _Said:
        """Let the model answer; turns that have to be left out leave ``past``."""
        if self._tokens >= self._limits.tokens:
            raise Stopped(_limit("max_tokens", f"the model wrote {self._tokens} tokens"))
        said = _Said()
        stream, dropped = await self._asked(past, messages)
        async with aclosing(stream):
            if dropped:
                await self._transcript.start(StepType.SAFETY_FILTERING)
                what = f"the {dropped} oldest turns were left out: the talk did not fit the model's context"
                await self._transcript.end(violation=Violation(violation_type=HISTORY_DROPPED, details=what))
            await self._transcript.start(StepType.MODEL_INFERENCE)
            if self._agent.output_shields:
                await self._hear_withheld(stream, said, messages)
            else:
                async for chunk in stream:
                    if not self._note(said, chunk):
                        break
                    await self._tell(chunk.text_delta)
        if said.stop_reason is None:
            raise UpstreamError("the model's answer ended before its end")
        if said.stop_reason is StopReason.MAX_TOKENS:
            raise Stopped(_limit("max_tokens", f"the model's answer was cut at {self._tokens} tokens", said.text))
        self._count(said.calls)
        theirs = list(filter(self._toolbox.is_for_client, said.calls))
        before = [self._judgement_of_call(call, messages) for call in theirs]
        await self._require_no_objection(before)
        for call in theirs:
            await self._transcript.add(tool_call=call)
        await self._transcript.end()
        if self._agent.output_shields or any(shields for shields, _ in before):
            await self._transcript.start(StepType.SAFETY_FILTERING)
            await self._transcript.end()
        return said

    async def _asked(self, past: list[list[Message]], messages: Sequence[Message]) -> tuple[Stream, int]:
        """The model's answer as it comes, and how many of the oldest turns left ``past`` for it.

        Where the policy drops turns, they are as few as let the rest fit; which number that is, is found by halving.
        """
        try:
            return await self._ask(past, messages), 0
        except ContextLengthError:
            if self._services.config.history is HistoryPolicy.REFUSE or not past:
                raise
        too_few, enough = 0, len(past)
        stream = await self._ask([], messages)
        try:
            while enough - too_few > 1:
                middle = (too_few + enough) // 2
                try:
                    longer = await self._ask(past[middle:], messages)
                except ContextLengthError:
                    too_few = middle
                else:
                    shorter, stream, enough = stream, longer, middle
                    await shorter.aclose()
        except BaseException:
            await stream.aclose()
            raise
        del past[:enough]
        return stream, enough

    async def _ask(self, past: Sequence[Sequence[Message]], messages: Sequence[Message]) -> Stream:
        prompt = [_readable(message) for message in chain(self._system(), *past, messages)]
        if len(prompt) > MAX_ITEMS:
            what = (
                f"the talk has {len(prompt)} messages, and a model is told at most {MAX_ITEMS}; leave earlier turns out"
            )
            raise InvalidRequestError(what, param="turn_history")
        return await self._services.inference.chat_completion(
            ChatCompletionRequest(
                model=self._agent.model,
                dialog=Dialog(message=prompt[-1], message_history=prompt[:-1]),
                available_tools=self._toolbox.definitions(),
                max_tokens=self._limits.tokens - self._tokens,
                stream=True,
            )
        )

    def _note(self, said: _Said, chunk: ChatCompletionResponseStreamChunk) -> bool:
        """Add a chunk to what was said; false where the turn has no token left for it."""
        if (chunk.text_delta or chunk.tool_call is not None) and self._tokens >= self._limits.tokens:
            said.stop_reason = StopReason.MAX_TOKENS  # the model was told how many there are, and went on
            return False
        said.text += chunk.text_delta
        self._tokens += bool(chunk.text_delta)
        if chunk.tool_call is not None:
            said.calls.append(chunk.tool_call)
            self._tokens += 1 + len(json.dumps(chunk.tool_call.arguments)) // CHARACTERS_A_TOKEN
        if chunk.stop_reason is not StopReason.NOT_STOPPED:
            said.stop_reason = chunk.stop_reason
        return True

    async def _hear_withheld(self, stream: Stream, said: _Said, context: Sequence[Message]) -> None:
        """Tell what the model writes window by window, each after its judgement. Stops the turn at an objection."""

        async def judge(text: str) -> Violation | None:
            return await self._judged(self._agent.output_shields, [*context, Message.assistant(text, said.calls)])

        withheld = Withheld(judge, window_characters=self._window)
        async for chunk in stream:
            if not self._note(said, chunk):
                break
            await self._tell(await withheld.add(chunk.text_delta))
            if withheld.violation is not None:
                raise Stopped(withheld.violation)
        await self._tell(await withheld.end())
        if withheld.violation is not None:
            raise Stopped(withheld.violation)

    async def _tell(self, text: str) -> None:
        if text:
            await self._transcript.add(response_text_delta=text)

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
        await self._judge_each(self._judgement_of_call(call, context) for call in calls)
        await self._transcript.start(StepType.TOOL_EXECUTION)
        for call in calls:
            await self._transcript.add(tool_call=call)
        responses = await asyncio.gather(*map(self._toolbox.run, calls))
        after = [
            (self._shields(call.tool_name, "output"), [*context, Message.tool([response])])
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

    def _judgement_of_call(self, call: ToolCall, context: Sequence[Message]) -> Judgement:
        return self._shields(call.tool_name, "input"), [*context, Message.assistant("", [call])]

    def _shields(self, tool_name: str, side: str) -> Sequence[ShieldConfig]:
        definition = self._toolbox.definition(tool_name)
        if definition is None:
            return ()
        return definition.input_shields if side == "input" else definition.output_shields

    def _system(self) -> list[Message]:
        return [Message.system(self._agent.instructions)] if self._agent.instructions.strip() else []


def _limit(kind: str, what: str, answer: str = "") -> Violation:
    return Violation(violation_type=kind, details=what, suggested_user_response=answer or f"I had to stop: {what}.")


def _readable(message: Message) -> Message:
    """The message for a model that reads text: of what a tool attached it is told the type."""
    if not message.tool_responses:
        return message
    told = [each.model_copy(update={"content": _noted(each.content)}) for each in message.tool_responses]
    return message.model_copy(update={"tool_responses": told})


def _noted(content: Content) -> str:
    items = content if isinstance(content, list) else [content]
    return "\n".join(f"[attached: {item.mime_type}]" if isinstance(item, Attachment) else item for item in items)
