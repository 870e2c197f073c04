"""Declares agents, and the tools that come with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from llama_stack.apis import AgenticSystem, Inference, MemoryBanks, Safety
from llama_stack.plugins import ProviderSpec, ToolSpec, hookimpl
from llama_stack.storage import Database
from llama_stack.tools import Tool, Tools, ToolSource

from .config import AgentsConfig
from .tools.mcp import McpConfig
from .tools.sandbox import SandboxConfig


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
    )
    yield ToolSpec(name="mcp", start=start_mcp, config=McpConfig, description="The tools of an MCP server")
    yield ToolSpec(name="calculator", start=start_calculator, description="Arithmetic, for any other model")
