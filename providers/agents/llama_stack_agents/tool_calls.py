"""Calls of tools: which of them are ours to run, and running them so that no tool's failure ends a turn."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence

from llama_stack.apis.agentic_system import AgenticSystemCreateRequest
from llama_stack.apis.common import Attachment, Content, ToolCall, ToolDefinition, ToolResponse
from llama_stack.errors import StackError, UnavailableError, listed, nearest
from llama_stack.tools import Tools, ToolSession, ToolSource

from .config import AgentsConfig

CLOSE_SECONDS = 5.0
"""How long a session may take to be left."""

logger = logging.getLogger("llama_stack.agents")


class Toolbox:
    """The tools of one agent for one turn; leaving it ends their sessions."""

    def __init__(self, agent: AgenticSystemCreateRequest, tools: Tools, config: AgentsConfig) -> None:
        self.agent = agent
        self.tools = tools
        self.config = config
        self._sessions: dict[ToolSource, HeldSession] = {}
        self._attached_characters = 0

    async def __aenter__(self) -> Toolbox:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await asyncio.gather(*(held.close() for held in self._sessions.values()))

    def definitions(self) -> list[ToolDefinition]:
        """The tools as the model is told of them: what the agent leaves out of one that is served, the tool says."""
        return [self._told(tool) if tool.tool_name in self.agent.executable_tools else tool for tool in self._available]

    def definition(self, tool_name: str) -> ToolDefinition | None:
        """What the agent's creator said of the tool of that name, or ``None`` for one that the agent has not."""
        return next((tool for tool in self._available if tool.tool_name == tool_name), None)

    def is_for_client(self, call: ToolCall) -> bool:
        """Whether the tool is available and not ours to run. A tool that there is not is ours to say so of."""
        return self.definition(call.tool_name) is not None and call.tool_name not in self.agent.executable_tools

    async def run(self, call: ToolCall) -> ToolResponse:
        """What the tool answers, or why it did not, in words for the model. Only a cancellation ends it."""
        seconds = self._seconds(call)
        try:
            async with asyncio.timeout(seconds):
                content = await self._call(call)
        except TimeoutError:
            content = f"error: the tool took longer than {seconds:g} s"
        except StackError as error:
            content = f"error: {error.detail}"
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            logger.exception("tool %s failed", call.tool_name)
            content = "error: the tool failed"
        return ToolResponse(tool_name=call.tool_name, content=self._bounded(content))

    def _seconds(self, call: ToolCall) -> float:
        own = self.tools.timeout_seconds(call.tool_name) if call.tool_name in self.tools.names() else None
        return own or self.config.tool_timeout_seconds

    @property
    def _available(self) -> Sequence[ToolDefinition]:
        return self.agent.available_tools

    async def _call(self, call: ToolCall) -> Content:
        if self.definition(call.tool_name) is None:
            names = [tool.tool_name for tool in self._available]
            return f"error: there is no tool {call.tool_name!r}{nearest(call.tool_name, names)}; tools: {listed(names)}"
        session = await self._session(self.tools.find(call.tool_name))
        return await session.call(call.tool_name, call.arguments)

    async def _session(self, source: ToolSource) -> ToolSession:
        held = self._sessions.get(source)
        if held is None or held.has_failed:
            held = self._sessions[source] = HeldSession(source)  # calls side by side share one
        return await held.opened()

    def _told(self, given: ToolDefinition) -> ToolDefinition:
        try:
            own = self.tools.definition(given.tool_name)
        except StackError:  # it is down for now; a call of it will say so
            return given
        missing = {"parameters": own.parameters, "description": own.description}
        return given.model_copy(update={key: value for key, value in missing.items() if getattr(given, key) is None})

    def _bounded(self, content: Content) -> Content:
        items = content if isinstance(content, list) else [content]
        length = sum(len(item) for item in items if isinstance(item, str))
        most = self.config.max_tool_characters
        if length > most:
            return f"error: the tool answered {length} characters, and at most {most} are read; ask for less"
        attached, most = (
            sum(len(item.url) for item in items if isinstance(item, Attachment)),
            self.config.max_attachment_characters,
        )
        if attached > most:
            return f"error: the tool attached {attached} characters, and at most {most} are taken; ask for less"
        most = self.config.max_tool_attachment_characters - self._attached_characters
        if attached > most:
            return f"error: the tool attached {attached} characters, and {most} are left for this turn; ask for less"
        self._attached_characters += attached
        return content


class HeldSession:
    """A session in a task of its own, which enters it and leaves it: libraries with cancel scopes want it so."""

    def __init__(self, source: ToolSource) -> None:
        self._ended = asyncio.Event()
        self._session: asyncio.Future[ToolSession] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(source))

    @property
    def has_failed(self) -> bool:
        """Whether opening it came to nothing; another attempt may fare better."""
        return self._session.done() and self._session.exception() is not None

    async def opened(self) -> ToolSession:
        """The session. Raises what opening it raised."""
        return await asyncio.shield(self._session)

    async def close(self) -> None:
        """Leave the session; one that takes long over it is cancelled, and one that does not heed that is left."""
        self._ended.set()
        try:
            await asyncio.wait([self._task], timeout=CLOSE_SECONDS)
        finally:
            self._task.cancel()
        _, pending = await asyncio.wait([self._task], timeout=CLOSE_SECONDS)
        if pending:
            logger.error("a session of tools does not end, although it was cancelled")

    async def _hold(self, source: ToolSource) -> None:
        try:
            async with source.session() as session:
                self._session.set_result(session)
                await self._ended.wait()
        except (Exception, SystemExit) as error:
            if self._session.done():
                logger.warning("a session of tools ended badly", exc_info=error)
            else:
                self._session.set_exception(error)
        finally:
            if not self._session.done():
                self._session.set_exception(UnavailableError("the tool's session was cancelled while it was opened"))
            self._session.exception()  # seen: nobody may be waiting for it any more


def call_key(call: ToolCall) -> str:
    """The same for two calls of one tool with equal arguments."""
    return json.dumps([call.tool_name, call.arguments], sort_keys=True)
