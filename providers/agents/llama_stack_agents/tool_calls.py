"""Calls of tools: which of them are ours to run, and running them so that no tool's failure ends a turn."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack

from llama_stack.apis.agentic_system import AgenticSystemCreateRequest
from llama_stack.apis.common import Content, ToolCall, ToolDefinition, ToolResponse
from llama_stack.errors import StackError, listed, nearest
from llama_stack.tools import Tool, Tools

from .config import AgentsConfig

logger = logging.getLogger("llama_stack.agents")


class Toolbox:
    """The tools of one agent for one turn; leaving it ends their sessions."""

    def __init__(self, agent: AgenticSystemCreateRequest, tools: Tools, config: AgentsConfig) -> None:
        self.agent = agent
        self.tools = tools
        self.config = config
        self._sessions: dict[str, Tool] = {}
        self._opening = asyncio.Lock()
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> Toolbox:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._opened.aclose()

    def definitions(self) -> list[ToolDefinition]:
        """The tools as the model is told of them: what the agent leaves out of one that is served, the tool says."""
        return [self._told(tool) if tool.tool_name in self.agent.executable_tools else tool for tool in self._available]

    def definition(self, call: ToolCall) -> ToolDefinition | None:
        """What the agent's creator said of the tool that is called, or ``None`` for one that the agent has not."""
        return next((tool for tool in self._available if tool.tool_name == call.tool_name), None)

    def is_for_client(self, call: ToolCall) -> bool:
        """Whether the tool is available and not ours to run. A tool that there is not is ours to say so of."""
        return self.definition(call) is not None and call.tool_name not in self.agent.executable_tools

    async def run(self, call: ToolCall) -> ToolResponse:
        """What the tool answers, or why it did not, in words for the model. Only a cancellation ends it."""
        seconds = self.config.tool_timeout_seconds
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

    @property
    def _available(self) -> Sequence[ToolDefinition]:
        return self.agent.available_tools

    async def _call(self, call: ToolCall) -> Content:
        if self.definition(call) is None:
            names = [tool.tool_name for tool in self._available]
            return f"error: there is no tool {call.tool_name!r}{nearest(call.tool_name, names)}; tools: {listed(names)}"
        return await (await self._session(call.tool_name)).run(call.arguments)

    async def _session(self, name: str) -> Tool:
        async with self._opening:  # calls side by side share one
            if name not in self._sessions:
                opening = self.tools.find(name).session()
                self._sessions[name] = await self._opened.enter_async_context(opening)
            return self._sessions[name]

    def _told(self, given: ToolDefinition) -> ToolDefinition:
        try:
            own = self.tools.find(given.tool_name).definition
        except StackError:  # it is down for now; a call of it will say so
            return given
        missing = {"parameters": own.parameters, "description": own.description}
        return given.model_copy(update={key: value for key, value in missing.items() if getattr(given, key) is None})

    def _bounded(self, content: Content) -> Content:
        items = content if isinstance(content, list) else [content]
        length = sum(len(item) for item in items if isinstance(item, str))
        most = self.config.max_tool_characters
        if length <= most:
            return content
        return f"error: the tool answered {length} characters, and at most {most} are read; ask for less"


def call_key(call: ToolCall) -> str:
    """The same for two calls of one tool with equal arguments."""
    return json.dumps([call.tool_name, call.arguments], sort_keys=True)
