"""Checks of AgenticSystem."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from ...apis import AgenticSystem
from ...apis.agentic_system import (
    AgenticSystemCreateRequest,
    AgenticSystemExecuteRequest,
    AgenticSystemExecuteResponse,
    AgenticSystemTurn,
    EventType,
    ModelInferenceStep,
)
from ...apis.common import Message, Role, ShieldConfig
from ...errors import AlreadyExistsError, ConflictError, InvalidRequestError, NotFoundError
from ...turns import turn_of
from .checks import check, everything, refused
from .subject import Subject

_HELLO = Message.user("Hello!")


async def _request(subject: Subject, uuid: str, **more: Any) -> AgenticSystemCreateRequest:
    given = {
        "instructions": "Answer in a few words.",
        "available_tools": [],
        "executable_tools": [],
        "memory_bank_uuids": [],
        "input_shields": [],
        "output_shields": [],
    }
    return AgenticSystemCreateRequest(uuid=uuid, model=await subject.model(is_anyones=True), **(given | more))


@asynccontextmanager
async def _agent(subject: Subject, **more: Any) -> AsyncIterator[str]:
    uuid = subject.new_id("agent")
    await subject.client.agentic_system.create(await _request(subject, uuid, **more))
    try:
        yield uuid
    finally:
        with suppress(NotFoundError):
            await subject.client.agentic_system.delete_agent(uuid)


async def _turn(subject: Subject, agent: str, *history: AgenticSystemTurn) -> AgenticSystemTurn:
    request = AgenticSystemExecuteRequest(agent_uuid=agent, messages=[_HELLO], turn_history=list(history))
    answer = await subject.client.agentic_system.execute(request)
    assert isinstance(answer, AgenticSystemExecuteResponse), "a whole turn was asked for"
    return answer.turn


@check(AgenticSystem)
async def an_agent_answers(subject: Subject) -> None:
    """A turn has the user's messages, at least one step of inference, and an answer of the assistant's."""
    async with _agent(subject) as agent:
        turn = await _turn(subject, agent)
        assert turn.user_messages == [_HELLO], "the user's messages are others"
        assert any(isinstance(step, ModelInferenceStep) for step in turn.steps), "no step of inference"
        assert turn.response_message.role is Role.ASSISTANT, f"answered by {turn.response_message.role.value}"
        uuids = [step.uuid for step in turn.steps]
        assert len(set(uuids)) == len(uuids), "two steps have one id"


@check(AgenticSystem)
async def the_sum_of_a_stream_is_the_turn(subject: Subject) -> None:
    """The chunks of a streamed turn, put together, are the turn that the same request gets whole."""
    async with _agent(subject) as agent:
        whole = await _turn(subject, agent)
        request = AgenticSystemExecuteRequest(agent_uuid=agent, messages=[_HELLO], turn_history=[], stream=True)
        chunks = await everything(await subject.client.agentic_system.execute(request))
        rebuilt = turn_of([_HELLO], chunks)
        assert rebuilt.response_message == whole.response_message, "the stream answers otherwise"
        kinds = [step.step_type for step in whole.steps]
        assert [step.step_type for step in rebuilt.steps] == kinds, "the stream has other steps"


@check(AgenticSystem)
async def steps_begin_and_end(subject: Subject) -> None:
    """Each step of a stream begins once, ends once, and nothing of it comes before its start or after its end."""
    async with _agent(subject) as agent:
        request = AgenticSystemExecuteRequest(agent_uuid=agent, messages=[_HELLO], turn_history=[], stream=True)
        open_steps, ended = set[str](), set[str]()
        chunks = await everything(await subject.client.agentic_system.execute(request))
        for chunk in chunks:
            if chunk.event_type is EventType.STEP_START:
                assert chunk.step_uuid not in open_steps | ended, "a step starts twice"
                open_steps.add(chunk.step_uuid)
            assert chunk.step_uuid in open_steps, "a chunk stands outside its step"
            if chunk.event_type is EventType.STEP_END:
                open_steps.remove(chunk.step_uuid)
                ended.add(chunk.step_uuid)
        assert not open_steps, "a step does not end"
        assert ended, "the stream has no steps"


@check(AgenticSystem)
async def turns_that_were_taken_are_sent_again_by_the_client(subject: Subject) -> None:
    """A turn takes the earlier ones from the request, exactly as they were answered."""
    async with _agent(subject) as agent:
        first = await _turn(subject, agent)
        second = await _turn(subject, agent, first)
        assert second.response_message.role is Role.ASSISTANT
        assert second.user_messages == [_HELLO], "earlier messages are in the new turn"


@check(AgenticSystem)
async def creating_again_succeeds_with_the_same_request_alone(subject: Subject) -> None:
    """The same request again is a success, and another one of that id is a 409."""
    async with _agent(subject) as agent:
        agents = subject.client.agentic_system
        assert (await agents.create(await _request(subject, agent))).agent_uuid == agent
        other = await _request(subject, agent, instructions="Another.")
        await refused(agents.create(other), AlreadyExistsError, ConflictError)


@check(AgenticSystem)
async def what_an_agent_names_must_be_there(subject: Subject) -> None:
    """A model, a bank or a shield that is not served is refused when the agent is created."""
    agents = subject.client.agentic_system
    unknown = subject.new_id("unknown")
    shield = ShieldConfig(shield_type=unknown, params={})
    for more in ({"memory_bank_uuids": [unknown]}, {"input_shields": [shield]}, {"output_shields": [shield]}):
        request = await _request(subject, subject.new_id("agent"), **more)
        await refused(agents.create(request), InvalidRequestError, NotFoundError)
    request = await _request(subject, subject.new_id("agent"))
    nobody = request.model_copy(update={"model": unknown})
    await refused(agents.create(nobody), InvalidRequestError, NotFoundError)


@check(AgenticSystem)
async def an_agent_that_is_not_there_is_404(subject: Subject) -> None:
    """Executing or deleting an agent that does not exist is a 404, streamed before the first byte."""
    agents, uuid = subject.client.agentic_system, subject.new_id("no-agent")
    for stream in (False, True):
        request = AgenticSystemExecuteRequest(agent_uuid=uuid, messages=[_HELLO], turn_history=[], stream=stream)
        await refused(agents.execute(request), NotFoundError)
    await refused(agents.delete_agent(uuid), NotFoundError)


@check(AgenticSystem)
async def a_deleted_agent_is_gone(subject: Subject) -> None:
    """After its delete an agent is neither listed nor executed."""
    async with _agent(subject) as agent:
        agents = subject.client.agentic_system
        listed = await everything(await agents.list_agents())
        assert agent in [one.agent.uuid for one in listed], "it is not listed"
        await agents.delete_agent(agent)
        request = AgenticSystemExecuteRequest(agent_uuid=agent, messages=[_HELLO], turn_history=[])
        await refused(agents.execute(request), NotFoundError)
        listed = await everything(await agents.list_agents())
        assert agent not in [one.agent.uuid for one in listed], "it is listed after its delete"


@check(AgenticSystem)
async def agents_outlive_a_restart(subject: Subject) -> None:
    """An agent that was created answers after a restart."""
    uuid = subject.new_id("agent")
    await subject.client.agentic_system.create(await _request(subject, uuid))
    await subject.restart()
    answer = await _turn(subject, uuid)
    await subject.client.agentic_system.delete_agent(uuid)
    assert answer.steps, "it answers without a step"


@check(AgenticSystem)
async def turns_at_once_do_not_mix(subject: Subject) -> None:
    """Eight turns at a time are answered as one alone."""
    async with _agent(subject) as agent:
        alone = (await _turn(subject, agent)).response_message
        together = await asyncio.gather(*(_turn(subject, agent) for _ in range(8)))
        assert all(turn.response_message == alone for turn in together), "other answers beside others"
