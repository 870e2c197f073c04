"""The AgenticSystem API: agents that are kept, and the turns that they take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from llama_stack.apis import AgenticSystem
from llama_stack.apis.agentic_system import (
    AgentDescription,
    AgenticSystemCreateRequest,
    AgenticSystemCreateResponse,
    AgenticSystemExecuteRequest,
    AgenticSystemExecuteResponse,
    AgenticSystemExecuteResponseStreamChunk,
)
from llama_stack.apis.common import Role, ShieldConfig
from llama_stack.apis.safety import RunShieldRequest
from llama_stack.errors import FieldFault, InvalidRequestError, ModelNotFoundError, NotFoundError, listed
from llama_stack.turns import turn_of

from .store import Agents
from .turn import Services, TurnLoop

Chunk = AgenticSystemExecuteResponseStreamChunk
logger = logging.getLogger("llama_stack.agents")

QUEUED_CHUNKS = 16
"""How far a turn may run ahead of a client that reads slowly."""


class AgentsProvider(AgenticSystem):
    """Agents over the stack's own APIs. Turns are not kept: a client sends the earlier ones again."""

    def __init__(self, services: Services, agents: Agents) -> None:
        self._services = services
        self._agents = agents

    async def owns(self, resource: str) -> bool:
        with suppress(NotFoundError):
            await self._agents.get(resource)
            return True
        return False

    async def create(self, request: AgenticSystemCreateRequest) -> AgenticSystemCreateResponse:
        """Keep an agent. Raises ``InvalidRequestError`` for tools, banks and shields that are not served here."""
        await self._require_served(request)
        await self._agents.add(request)
        return AgenticSystemCreateResponse(agent_uuid=request.uuid)

    async def execute(
        self, request: AgenticSystemExecuteRequest
    ) -> AgenticSystemExecuteResponse | AsyncIterator[Chunk]:
        """Take a turn. Raises ``InvalidRequestError`` where there is nothing new to answer."""
        agent = await self._agents.get(request.agent_uuid)
        _require_new_messages(request)
        if request.stream:
            return self._chunks(agent, request)
        chunks: list[Chunk] = []

        async def keep(chunk: Chunk) -> None:
            chunks.append(chunk)

        await TurnLoop(self._services, agent, keep, window_characters=None).run(request)
        return AgenticSystemExecuteResponse(turn=turn_of(request.messages, chunks))

    async def delete_agent(self, agent_id: str) -> None:
        await self._agents.remove(agent_id)

    async def list_agents(self) -> AsyncIterator[AgentDescription]:
        return self._descriptions()

    async def _descriptions(self) -> AsyncIterator[AgentDescription]:
        async for agent in self._agents.all():
            yield AgentDescription(agent=agent)

    async def _chunks(
        self, agent: AgenticSystemCreateRequest, request: AgenticSystemExecuteRequest
    ) -> AsyncIterator[Chunk]:
        """The turn's chunks as they come; closing the iterator cancels the turn."""
        queue: asyncio.Queue[Chunk | None] = asyncio.Queue(QUEUED_CHUNKS)
        window = self._services.config.window_characters

        async def take() -> None:
            try:
                await TurnLoop(self._services, agent, queue.put, window_characters=window).run(request)
            finally:
                with suppress(asyncio.QueueFull):  # a reader that is behind looks at the task once it has caught up
                    queue.put_nowait(None)

        task = asyncio.create_task(take())
        try:
            while not (task.done() and queue.empty()):
                chunk = await queue.get()
                if chunk is not None:
                    yield chunk
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _require_served(self, agent: AgenticSystemCreateRequest) -> None:
        services = self._services
        models = [model.model for model in await services.inference.models()]
        if agent.model not in models:
            raise ModelNotFoundError(agent.model, models)
        faults: list[FieldFault] = []
        if unknown := set(agent.executable_tools) - set(services.tools.names()):
            served = listed(services.tools.names())
            faults.append(_fault("/executable_tools", f"tools not served here: {listed(unknown)}; served: {served}"))
        if agent.memory_bank_uuids:
            banks = [bank.uuid async for bank in await services.banks.list_banks()] if services.banks else []
            if gone := set(agent.memory_bank_uuids) - set(banks):
                faults.append(_fault("/memory_bank_uuids", f"memory banks that do not exist here: {listed(gone)}"))
        names: set[str] = set()
        for number, tool in enumerate(agent.available_tools):
            if tool.tool_name in names:
                what = f"tool {tool.tool_name!r} stands there twice; which shields would hold?"
                faults.append(FieldFault(f"/available_tools/{number}/tool_name", "duplicate", what))
            names.add(tool.tool_name)
        served_shields = await services.safety.shields() if services.safety else []
        for pointer, shield in _shields(agent):
            if shield.shield_type not in served_shields:
                what = f"shield {shield.shield_type!r} is not served here; served: {listed(served_shields)}"
                faults.append(_fault(pointer, what))
            elif told := await self._fault_of_params(shield):
                faults.append(FieldFault(f"{pointer}/params", "invalid", told))
        if faults:
            raise InvalidRequestError(faults[0].detail, faults=faults)

    async def _fault_of_params(self, shield: ShieldConfig) -> str | None:
        """Why a shield would object to everything: it does not take its parameters."""
        assert self._services.safety is not None
        try:
            await self._services.safety.run_shield(RunShieldRequest(messages=[], shield=shield))
        except InvalidRequestError as error:
            return error.detail if error.param == "params" else None
        except Exception:  # it is down, or a stranger's that does not expect this: its turns will fail closed
            logger.debug("the parameters of shield %s could not be checked", shield.shield_type, exc_info=True)
        return None


def _shields(agent: AgenticSystemCreateRequest) -> list[tuple[str, ShieldConfig]]:
    """Every shield that the agent names, with its place."""
    lists = [("/input_shields", agent.input_shields), ("/output_shields", agent.output_shields)]
    for number, tool in enumerate(agent.available_tools):
        lists.append((f"/available_tools/{number}/input_shields", tool.input_shields))
        lists.append((f"/available_tools/{number}/output_shields", tool.output_shields))
    return [(f"{place}/{n}", shield) for place, shields in lists for n, shield in enumerate(shields)]


def _fault(pointer: str, detail: str) -> FieldFault:
    return FieldFault(pointer, "not_found", detail)


def _require_new_messages(request: AgenticSystemExecuteRequest) -> None:
    if not request.messages:
        raise InvalidRequestError(
            "there is no message to answer; the earlier ones go into turn_history", param="messages"
        )
    for number, message in enumerate(request.messages):
        if message.role not in (Role.USER, Role.TOOL):
            what = f"a new message is from the user or a tool, not from {message.role.value!r}; earlier ones go into "
            fault = FieldFault(f"/messages/{number}/role", "not_in_enum", what + "turn_history")
            raise InvalidRequestError(fault.detail, faults=[fault])
