"""Agents on disk: what was created is there after a restart, until it is deleted."""

from __future__ import annotations

from collections.abc import AsyncIterator

from llama_stack.apis.agentic_system import AgenticSystemCreateRequest
from llama_stack.errors import AlreadyExistsError, NotFoundError
from llama_stack.storage import Database, Migration

MIGRATIONS = [
    Migration(
        number=1,
        description="agents",
        statements=["CREATE TABLE {agents} (uuid TEXT PRIMARY KEY, body TEXT NOT NULL)"],
    )
]


class Agents:
    """The agents of one provider."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, agent: AgenticSystemCreateRequest) -> None:
        """Keep an agent; the same again is nothing new. Raises ``AlreadyExistsError`` for another one of its id."""
        sql = self._database.sql
        async with self._database.write() as connection:
            found = await connection.scalar(sql("SELECT body FROM {agents} WHERE uuid = :uuid"), {"uuid": agent.uuid})
            if found is None:
                values = {"uuid": agent.uuid, "body": agent.model_dump_json(exclude_none=True)}
                await connection.execute(sql("INSERT INTO {agents} (uuid, body) VALUES (:uuid, :body)"), values)
            elif not _alike(_agent(found), agent):
                raise AlreadyExistsError("agent", agent.uuid, param="uuid")

    async def get(self, uuid: str) -> AgenticSystemCreateRequest:
        """The agent of that id. Raises ``NotFoundError``."""
        async with self._database.read() as connection:
            statement = self._database.sql("SELECT body FROM {agents} WHERE uuid = :uuid")
            found = await connection.scalar(statement, {"uuid": uuid})
        if found is None:
            raise NotFoundError(f"agent {uuid!r} does not exist here", param="agent_uuid")
        return _agent(found)

    async def remove(self, uuid: str) -> None:
        """Forget an agent. Raises ``NotFoundError`` where there is none of that id."""
        async with self._database.write(frees_space=True) as connection:
            statement = self._database.sql("DELETE FROM {agents} WHERE uuid = :uuid")
            removed = await connection.execute(statement, {"uuid": uuid})
            if removed.rowcount == 0:
                raise NotFoundError(f"agent {uuid!r} does not exist here", param="agent_id")

    async def all(self) -> AsyncIterator[AgenticSystemCreateRequest]:
        """All agents, by id."""
        async with self._database.read() as connection:
            bodies = list(await connection.scalars(self._database.sql("SELECT body FROM {agents} ORDER BY uuid")))
        for body in bodies:
            yield _agent(body)


def _agent(body: str) -> AgenticSystemCreateRequest:
    return AgenticSystemCreateRequest.model_validate_json(body)


def _alike(one: AgenticSystemCreateRequest, other: AgenticSystemCreateRequest) -> bool:
    """Whether they are the same agent; the order of ``executable_tools`` says nothing (spec rule G17)."""
    ordered = [agent.model_copy(update={"executable_tools": sorted(agent.executable_tools)}) for agent in (one, other)]
    return ordered[0] == ordered[1]
