"""Tools of an MCP server (modelcontextprotocol.io): a program that is started, or an address.

What the server offers is asked for once, at the start. A turn has one session with it, opened at its first call and
bounded as every session of tools is; a server whose tools change is restarted with the stack.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, SecretStr, model_validator

from llama_stack.apis import Config
from llama_stack.apis.common import Attachment, Content, ToolDefinition
from llama_stack.errors import InvalidRequestError, ProviderStartError, UpstreamError
from llama_stack.tools import ToolSession, ToolSource

if TYPE_CHECKING:
    from mcp import Client

MAX_TOOLS = 1000
READ_SECONDS = 300.0
"""How long a server may send nothing while it works on a call; the call's own limit is usually shorter."""


class McpConfig(Config):
    """Where the server is, and what of it agents may use."""

    command: tuple[str, ...] = ()
    """The program to start and its arguments; it speaks on standard input and output."""
    environment: dict[str, SecretStr] = Field(default_factory=dict)
    """Environment variables of the program; of the server's own it gets the few that a program needs."""
    folder: Path | None = None
    """Where the program is started."""
    url: str | None = Field(default=None, pattern=r"^https?://[^\s]+$", max_length=2048)
    """The address of a server that is running (Streamable HTTP), such as ``https://tools.example/mcp``."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Headers that each request to ``url`` carries, such as ``Authorization``."""
    tools: tuple[str, ...] | None = None
    """The tools that agents may be given, by the server's names; all of them when left out."""
    prefix: str = Field(default="", pattern=r"^[A-Za-z0-9_-]*$", max_length=64)
    """What is put before each name, where two servers have tools of one name."""
    timeout_seconds: float = Field(default=30.0, gt=0, le=600)
    """How long the server may take to be connected, and to list its tools."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.command) == bool(self.url):
            raise ValueError("write 'command:' for a program to start or 'url:' for a server that runs; one of the two")
        return self


class McpServer(ToolSource):
    """The tools of one server. ``connected`` makes it."""

    def __init__(self, config: McpConfig, definitions: Sequence[ToolDefinition]) -> None:
        self._config = config
        self._definitions = tuple(definitions)

    @property
    def definitions(self) -> Sequence[ToolDefinition]:
        return self._definitions

    @asynccontextmanager
    async def session(self) -> AsyncIterator[ToolSession]:
        async with _client(self._config) as client:
            yield _McpSession(client, self._config.prefix)


async def connected(config: McpConfig) -> McpServer:
    """Ask the server for its tools. Raises ``ProviderStartError`` for one that cannot be used or lacks some."""
    try:
        async with asyncio.timeout(config.timeout_seconds), _client(config) as client:
            offered = await _offered(client)
    except TimeoutError as error:
        raise ProviderStartError(f"the MCP server did not answer in {config.timeout_seconds:g} s") from error
    except Exception as error:  # the library's, of whatever the transport is made of
        raise ProviderStartError(f"the MCP server cannot be used: {_reason(error)}") from error
    wanted = offered if config.tools is None else {name: offered[name] for name in config.tools if name in offered}
    if missing := set(config.tools or ()) - set(offered):
        raise ProviderStartError(f"the MCP server has no tool {', '.join(sorted(missing))}")
    return McpServer(config, [each.model_copy(update={"tool_name": config.prefix + n}) for n, each in wanted.items()])


class _McpSession:
    def __init__(self, client: Client, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        """Raises ``InvalidRequestError`` with the server's words where it says that the call failed."""
        from mcp import MCPError

        try:
            answer = await self._client.call_tool(name.removeprefix(self._prefix), dict(arguments))
        except MCPError as error:
            raise InvalidRequestError(str(error)) from error
        content = _content(answer.content)
        if answer.is_error:
            raise InvalidRequestError("\n".join(part for part in content if isinstance(part, str)) or "the tool failed")
        return content[0] if len(content) == 1 else content or "(no answer)"


@asynccontextmanager
async def _client(config: McpConfig) -> AsyncIterator[Client]:
    import httpx2
    from mcp import Client, StdioServerParameters, stdio_client
    from mcp.client.streamable_http import streamable_http_client

    async with AsyncExitStack() as stack:
        if config.url is None:
            secrets = {name: value.get_secret_value() for name, value in config.environment.items()}
            program = StdioServerParameters(
                command=config.command[0], args=list(config.command[1:]), env=secrets, cwd=config.folder
            )
            nowhere = stack.enter_context(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))  # ours is the log
            yield await stack.enter_async_context(Client(stdio_client(program, errlog=nowhere)))
            return
        headers = {name: value.get_secret_value() for name, value in config.headers.items()}
        waits = httpx2.Timeout(config.timeout_seconds, read=READ_SECONDS)
        http = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=waits, trust_env=False))
        yield await stack.enter_async_context(Client(streamable_http_client(config.url, http_client=http)))


async def _offered(client: Client) -> dict[str, ToolDefinition]:
    """All tools of a server by name."""
    found: dict[str, ToolDefinition] = {}
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            properties = tool.input_schema.get("properties", {})
            description = (tool.description or tool.title or "")[:10_000]
            found[tool.name] = ToolDefinition(tool_name=tool.name, description=description, parameters=properties)
        cursor = page.next_cursor
        if cursor is None:
            return found
        if len(found) > MAX_TOOLS:
            raise UpstreamError(f"it has more than {MAX_TOOLS} tools")


def _content(parts: Sequence[Any]) -> list[str | Attachment]:
    """Texts and pictures; of anything else its type is told."""
    found: list[str | Attachment] = []
    for part in parts:
        if part.type == "text":
            found.append(part.text)
        elif part.type in ("image", "audio"):
            found.append(Attachment(url=f"data:{part.mime_type};base64,{part.data}", mime_type=part.mime_type))
        else:
            found.append(f"[{part.type}]")
    return found


def _reason(error: BaseException) -> str:
    """The innermost of an exception group's reasons."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:300]
