"""An MCP server with a tool of every temper, for tests: ``python mcp_server.py``."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("test")
calls = 0


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def count() -> int:
    """How often this server was called: one session, one server."""
    global calls
    calls += 1
    return calls


@server.tool()
def fail() -> str:
    """Never works."""
    raise ToolError("the kettle is empty")


@server.tool()
def variable(name: str) -> str:
    """Read an environment variable."""
    return os.environ.get(name, "none")


@server.tool()
def draw() -> Image:
    """Draw a dot."""
    return Image(data=b"PNG", format="png")


@server.tool()
def leave() -> str:
    """End the server in the middle of a call."""
    os._exit(3)


@server.tool()
async def wait() -> str:
    """Never ends."""
    await asyncio.Event().wait()
    return ""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
