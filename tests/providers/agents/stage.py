"""An agent on a stage: a scripted model, shields and banks that do as they are called, real tools and a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from llama_stack_agents import AgentsConfig
from llama_stack_agents.provider import AgentsProvider
from llama_stack_agents.store import MIGRATIONS, Agents
from llama_stack_agents.turn import Services

from llama_stack.apis import MemoryBanks, Safety
from llama_stack.apis.agentic_system import (
    AgenticSystemCreateRequest,
    AgenticSystemExecuteRequest,
    AgenticSystemExecuteResponse,
    AgenticSystemExecuteResponseStreamChunk,
    AgenticSystemTurn,
    SafetyFilteringStep,
)
from llama_stack.apis.common import Message, ShieldConfig, ToolCall, ToolDefinition
from llama_stack.apis.memory_banks import (
    IndexKind,
    MemoryBank,
    MemoryBankDocument,
    QueryHit,
    QueryRequest,
    QueryResponse,
)
from llama_stack.apis.safety import RunShieldRequest, RunShieldResponse, Violation
from llama_stack.client import chunks as chunks_of
from llama_stack.errors import InvalidRequestError, NotFoundError
from llama_stack.fetch import Fetcher
from llama_stack.storage import open_store
from llama_stack.testing.scripted_inference import SCRIPTED_MODEL, Answer, ScriptedInference
from llama_stack.tools import Tool, Tools, ToolSource
from llama_stack.turns import turn_of

REFUSED = "Let us talk of something else."


MISBEHAVING = ("raises", "hangs", "exits", "cancels", "junk", "junk inside", "junk beside")
"""Shields that come to no verdict, by what they do instead."""


class Junk:
    """Looks like an answer without an objection and is none."""

    violation = None


class WordShields(Safety):
    """Shields that object to a word, ``word:bomb``, and some that misbehave; every judgement is written down."""

    def __init__(self) -> None:
        self.judged: list[str] = []
        self.most_at_once = 0
        self._at_once = 0

    async def shields(self) -> list[str]:
        return ["word:bomb", "word:secret", "slow:bomb", *MISBEHAVING]

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        if not request.messages:
            raise InvalidRequestError("there is no message to judge", param="messages")
        kind, text = request.shield.shield_type, request.messages[-1].model_dump_json()
        self.judged.append(text)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0.01 if kind.startswith("slow") else 0)
        self._at_once -= 1
        if kind == "raises":
            raise RuntimeError("canary")
        if kind == "hangs":
            await asyncio.Event().wait()
        if kind == "exits":
            raise SystemExit(3)
        if kind == "cancels":
            raise asyncio.CancelledError
        if kind == "junk":
            return None  # type: ignore[return-value]  # which is the point
        if kind == "junk inside":
            return RunShieldResponse.model_construct(violation=cast(Any, "safe"))
        if kind == "junk beside":
            return cast(RunShieldResponse, Junk())
        word = kind.partition(":")[2]
        if word in text:
            return RunShieldResponse(
                violation=Violation(violation_type=kind, details=word, suggested_user_response=REFUSED)
            )
        return RunShieldResponse()


class Shelf(MemoryBanks):
    """Banks of sentences; a query finds those that share a word with it."""

    def __init__(self, **banks: Sequence[str]) -> None:
        self.banks = banks

    async def create(
        self,
        bank_uuid: str,
        bank_name: str,
        documents: list[MemoryBankDocument],
        embedding_model: str | None = None,
        chunk_tokens: int | None = None,
        chunk_overlap: int | None = None,
        index: IndexKind | None = None,
    ) -> None:
        raise NotImplementedError

    async def list_banks(self) -> AsyncIterator[MemoryBank]:
        return self._listed()

    async def _listed(self) -> AsyncIterator[MemoryBank]:
        for bank in self.banks:
            yield MemoryBank(uuid=bank, name=bank)

    async def drop(self, bank_uuid: str) -> str:
        raise NotImplementedError

    async def insert(self, bank_uuid: str, documents: list[MemoryBankDocument]) -> None:
        raise NotImplementedError

    async def update(self, bank_uuid: str, documents: list[MemoryBankDocument]) -> None:
        raise NotImplementedError

    async def get_documents(self, bank_uuid: str, document_uuids: list[str]) -> AsyncIterator[MemoryBankDocument]:
        raise NotImplementedError

    async def delete_documents(self, bank_uuid: str, document_uuids: list[str]) -> AsyncIterator[str]:
        raise NotImplementedError

    async def query(self, request: QueryRequest) -> QueryResponse:
        if request.bank_uuid not in self.banks:
            raise NotFoundError(f"bank {request.bank_uuid!r} does not exist")
        asked = set((request.text or "").lower().strip("?").split())
        hits = [
            QueryHit(document_uuid=f"{request.bank_uuid}-{n}", text=text, score=float(shared), metadata={"n": n})
            for n, text in enumerate(self.banks[request.bank_uuid])
            if (shared := len(asked & set(text.lower().strip(".").split())))
        ]
        return QueryResponse(hits=sorted(hits, key=lambda hit: -hit.score)[: request.k])


class Backend:
    """A tool that is up."""

    is_running = True

    def __init__(self, source: ToolSource, *, timeout_seconds: float | None = None) -> None:
        self.timeout_seconds = timeout_seconds
        self.id = source.definitions[0].tool_name
        self._source = source

    def running(self) -> ToolSource:
        return self._source


class Stage:
    """One provider of agents, and the agent ``a`` on it."""

    def __init__(self, model: ScriptedInference, provider: AgentsProvider, safety: WordShields) -> None:
        self.model = model
        self.provider = provider
        self.safety = safety
        self.chunks: list[AgenticSystemExecuteResponseStreamChunk] = []
        """Those of the last turn that was streamed."""

    async def turn(
        self, *messages: Message | str, history: Sequence[AgenticSystemTurn] = (), streamed: bool = False
    ) -> AgenticSystemTurn:
        """Let the agent take a turn; a streamed one is put together from its chunks."""
        said = [Message.user(message) if isinstance(message, str) else message for message in messages]
        request = AgenticSystemExecuteRequest(
            agent_uuid="a", messages=said, turn_history=list(history), stream=streamed
        )
        answer = await self.provider.execute(request)
        if isinstance(answer, AgenticSystemExecuteResponse):
            return answer.turn
        self.chunks = [chunk async for chunk in chunks_of(answer)]
        return turn_of(said, self.chunks)

    def prompt(self, number: int = -1) -> list[Message]:
        """What the model was asked, by default last."""
        return self.model.requests[number].dialog.messages


@asynccontextmanager
async def stage(
    *answers: Answer,
    tools: Sequence[Callable[..., Any]] = (),
    client_tools: Sequence[str] = (),
    served: Sequence[ToolSource] = (),
    hidden: Sequence[ToolSource] = (),
    banks: Shelf | None = None,
    bank_uuids: Sequence[str] = (),
    shields_in: Sequence[str] = (),
    shields_out: Sequence[str] = (),
    tool_shields_in: Sequence[str] = (),
    tool_shields_out: Sequence[str] = (),
    config: dict[str, Any] | None = None,
    instructions: str = "Be brief.",
    model: ScriptedInference | None = None,
    fetcher: Fetcher | None = None,
    timeouts: Mapping[str, float] | None = None,
) -> AsyncIterator[Stage]:
    """An agent whose model gives these answers and whose tools are these functions; ``hidden`` ones are not its own."""
    settings = AgentsConfig.model_validate(config or {})
    scripted = model or ScriptedInference(*answers)
    safety = WordShields()
    all_served: list[ToolSource] = [*map(Tool.from_function, tools), *served]
    seconds = timeouts or {}
    toolset = Tools(
        [Backend(tool, timeout_seconds=seconds.get(tool.definitions[0].tool_name)) for tool in (*all_served, *hidden)]
    )
    async with open_store("sqlite::memory:", Path()) as store:
        database = store.database("test.agents")
        await database.migrate(MIGRATIONS)
        services = Services(settings, scripted, safety, banks, toolset, fetcher or Fetcher(settings.fetch))
        provider = AgentsProvider(services, Agents(database))
        names = Tools([Backend(tool) for tool in all_served]).names()
        await provider.create(
            AgenticSystemCreateRequest(
                uuid="a",
                instructions=instructions,
                model=SCRIPTED_MODEL,
                available_tools=[
                    ToolDefinition(
                        tool_name=name,
                        input_shields=_configs(tool_shields_in),
                        output_shields=_configs(tool_shields_out),
                    )
                    for name in (*names, *client_tools)
                ],
                executable_tools=names,
                memory_bank_uuids=list(bank_uuids),
                input_shields=_configs(shields_in),
                output_shields=_configs(shields_out),
            )
        )
        yield Stage(scripted, provider, safety)


def call(tool_name: str, **arguments: Any) -> ToolCall:
    return ToolCall(tool_name=tool_name, arguments=arguments)


def kinds(turn: AgenticSystemTurn) -> list[str]:
    """The steps of a turn in a word each; an objection by its type."""
    return [
        f"!{step.violation.violation_type}"
        if isinstance(step, SafetyFilteringStep) and step.violation
        else step.step_type.value.partition("_")[0]
        for step in turn.steps
    ]


def _configs(shields: Sequence[str]) -> list[ShieldConfig]:
    return [ShieldConfig(shield_type=shield, params={}) for shield in shields]
