"""Code that a model writes, run in a sandbox: one session a turn; each call finds what the last one left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from llama_stack.apis.common import Attachment, Content, ToolDefinition
from llama_stack.errors import InvalidRequestError
from llama_stack.tools import Tool, ToolSession

from .sandbox import SandboxConfig, Session, session

DEFINITION = ToolDefinition(
    tool_name="code_interpreter",
    description="Runs Python code and gives what it prints. Variables are kept from call to call.",
    parameters={"code": {"type": "string", "description": "the Python code"}},
)


class CodeInterpreter(Tool):
    """Starts a sandbox for each session; a call outside of one gets a sandbox of its own."""

    definition = DEFINITION

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config

    @asynccontextmanager
    async def session(self) -> AsyncIterator[ToolSession]:
        async with session(self._config) as sandbox:
            yield _InSession(sandbox)

    async def run(self, arguments: Mapping[str, Any]) -> Content:
        async with self.session() as alone:
            return await alone.call(DEFINITION.tool_name, arguments)


class _InSession(Tool):
    definition = DEFINITION

    def __init__(self, sandbox: Session) -> None:
        self._sandbox = sandbox

    async def run(self, arguments: Mapping[str, Any]) -> Content:
        code = arguments.get("code")
        if not isinstance(code, str) or len(arguments) > 1:
            raise InvalidRequestError("code_interpreter takes one argument, 'code', which is text")
        result = await self._sandbox.run(code)
        text = result.output + (result.error or "")
        pictures = [Attachment(url=f"data:image/png;base64,{each}", mime_type="image/png") for each in result.figures]
        return [text, *pictures] if pictures else text or "(no output)"
