"""Declares agents, and the tools that come with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from llama_stack.apis import AgenticSystem, Inference, MemoryBanks, Safety
from llama_stack.plugins import Permission, ProviderSpec, ToolSpec, hookimpl
from llama_stack.storage import Database
from llama_stack.tools import Tool, Tools, ToolSource

from .config import AgentsConfig
from .tools.image_gen import ImageGenConfig
from .tools.mcp import McpConfig
from .tools.sandbox import SandboxConfig
from .tools.web_search import WebSearchConfig


@asynccontextmanager
async def start_agents(
    config: AgentsConfig,
    inference: Inference,
    safety: Safety | None,
    memory_banks: MemoryBanks | None,
    tools: Tools,
    database: Database,
) -> AsyncIterator[AgenticSystem]:
    """Agents over what the distribution serves."""
    from llama_stack.fetch import Fetcher

    from .provider import AgentsProvider
    from .store import MIGRATIONS, Agents
    from .turn import Services

    await database.migrate(MIGRATIONS)
    services = Services(config, inference, safety, memory_banks, tools, Fetcher(config.fetch))
    yield AgentsProvider(services, Agents(database))


@asynccontextmanager
async def start_math() -> AsyncIterator[Tool]:
    """Arithmetic, by the name that Llama models were trained on."""
    from .tools.math import math_tool

    yield math_tool("math")


@asynccontextmanager
async def start_calculator() -> AsyncIterator[Tool]:
    """The same arithmetic, described to the model as any other function is."""
    from .tools.math import math_tool

    yield math_tool("calculator")


@asynccontextmanager
async def start_code_interpreter(config: SandboxConfig) -> AsyncIterator[Tool]:
    """Python in a sandbox; without one the tool does not start, and says why."""
    from .tools.code_interpreter import CodeInterpreter
    from .tools.sandbox import check

    await check(config)
    yield CodeInterpreter(config)


@asynccontextmanager
async def start_mcp(config: McpConfig) -> AsyncIterator[ToolSource]:
    """The tools of an MCP server."""
    from .tools.mcp import connected

    yield await connected(config)


@asynccontextmanager
async def start_web_search(config: WebSearchConfig) -> AsyncIterator[Tool]:
    """One engine, or an index of this machine's own documents."""
    from .tools.web_search import started

    async with started(config) as tool:
        yield tool


@asynccontextmanager
async def start_image_gen(config: ImageGenConfig) -> AsyncIterator[Tool]:
    """An image service, or patterns."""
    from .tools.image_gen import image_gen

    yield image_gen(config)


@hookimpl
def llama_stack_providers() -> Iterator[ProviderSpec]:
    """One provider of the agentic system."""
    yield ProviderSpec(
        api=AgenticSystem,
        name="agents",
        config=AgentsConfig,
        start=start_agents,
        description="Agents over the distribution's own inference, shields, banks and tools",
    )


@hookimpl
def llama_stack_tools() -> Iterator[ToolSpec]:
    """The tools, by the names that Llama models know."""
    yield ToolSpec(name="math", start=start_math, description="Arithmetic, as Llama 3.1 and later call it unasked")
    yield ToolSpec(
        name="code_interpreter",
        start=start_code_interpreter,
        config=SandboxConfig,
        description="Python in a sandbox (bubblewrap)",
        permissions={
            Permission.PROCESSES: lambda config: ["bwrap"],
            Permission.FILES: lambda config: list(map(str, config.folders)),
        },
    )
    yield ToolSpec(
        name="mcp",
        start=start_mcp,
        config=McpConfig,
        description="The tools of an MCP server",
        permissions={
            Permission.PROCESSES: lambda config: config.command[:1],
            Permission.NETWORK: lambda config: [config.url] if config.url else [],
        },
    )
    yield ToolSpec(
        name="web_search",
        start=start_web_search,
        config=WebSearchConfig,
        description="Brave Search, Tavily, SearXNG, or a local index of documents",
        permissions={
            Permission.NETWORK: lambda config: [config.engine.url] if config.engine.kind != "local" else [],
            Permission.FILES: lambda config: [str(config.engine.folder)] if config.engine.kind == "local" else [],
        },
    )
    yield ToolSpec(
        name="image_gen",
        start=start_image_gen,
        config=ImageGenConfig,
        description="A service with OpenAI's images API, or patterns made without a model",
        permissions={
            Permission.NETWORK: lambda config: (
                [config.engine.url, *config.engine.image_hosts] if config.engine.kind == "openai" else []
            )
        },
    )
    yield ToolSpec(name="calculator", start=start_calculator, description="Arithmetic, for any other model")
