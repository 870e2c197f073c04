"""Tools of real MCP servers, started as programs and reached over HTTP."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from llama_stack_agents.tools.mcp import McpConfig, connected
from pydantic import ValidationError

from llama_stack.apis.common import Attachment, ToolDefinition
from llama_stack.errors import InvalidRequestError, ProviderStartError
from llama_stack.testing.scripted_inference import Answer
from tests.providers.agents.stage import call, stage
from tests.providers.agents.test_turn import tool_results

pytestmark = pytest.mark.anyio

SERVER = Path(__file__).with_name("mcp_server.py")
PROGRAM = (sys.executable, str(SERVER))


def config(**settings: Any) -> McpConfig:
    return McpConfig.model_validate({"command": PROGRAM} | settings)


@asynccontextmanager
async def over_http() -> AsyncIterator[str]:
    """The same server, listening; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(*PROGRAM, str(port), stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(30):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        os.kill(process.pid, 9)
        await process.wait()


async def test_a_server_s_tools_are_known_from_the_start() -> None:
    """Asked for once, not before every call."""
    server = await connected(config(tools=("add", "draw"), prefix="t_"))
    assert [each.tool_name for each in server.definitions] == ["t_add", "t_draw"]
    assert server.definitions[0].description == "Add two numbers."
    assert server.definitions[0].parameters is not None
    assert server.definitions[0].parameters.keys() == {"a", "b"}
    async with server.session() as session:
        assert await session.call("t_add", {"a": 17, "b": 4}) == "21"


async def test_a_server_over_http_is_like_one_that_is_started() -> None:
    """The same tools by another way."""
    async with over_http() as url:
        server = await connected(McpConfig(url=url))
        assert ToolDefinition in {type(each) for each in server.definitions}
        async with server.session() as session:
            assert await session.call("add", {"a": 1, "b": 2}) == "3"


async def test_what_a_tool_attaches_comes_back() -> None:
    """Pictures as they come from our own tools."""
    server = await connected(config())
    async with server.session() as session:
        picture = Attachment(url="data:image/png;base64,UE5H", mime_type="image/png")
        assert await session.call("draw", {}) == picture


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [("fail", {}, "the kettle is empty"), ("add", {"a": "x"}, "a"), ("no_such", {}, "no_such")],
)
async def test_a_failure_is_told_in_the_server_s_words(name: str, arguments: dict[str, Any], told: str) -> None:
    """The model may try otherwise, and the session goes on."""
    server = await connected(config())
    async with server.session() as session:
        with pytest.raises(InvalidRequestError, match=told):
            await session.call(name, arguments)
        assert await session.call("add", {"a": 1, "b": 1}) == "2"


async def test_a_program_gets_the_variables_that_it_is_given_and_not_the_server_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The keys of this process are not the tools' to read."""
    monkeypatch.setenv("LLAMA_STACK_CANARY", "secret")
    server = await connected(config(environment={"GIVEN": "yes"}))
    async with server.session() as session:
        assert await session.call("variable", {"name": "LLAMA_STACK_CANARY"}) == "none"
        assert await session.call("variable", {"name": "GIVEN"}) == "yes"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_turn_has_one_session_whatever_it_calls(streamed: bool) -> None:
    """Side by side and one after the other, several tools of one server; the next turn has a fresh one."""
    server = await connected(config())
    script: list[Answer] = [[call("count"), call("add", a=1, b=2)], [call("count")], ["Done."]]
    async with stage(*script, *script, served=[server]) as on:
        for _ in range(2):
            turn = await on.turn("Go", streamed=streamed)
            assert tool_results(turn) == ["1", "3", "2"]


async def test_a_server_that_dies_in_a_call_is_the_tool_s_failure() -> None:
    """The turn goes on, and nothing of the server is left."""
    server = await connected(config())
    async with stage(
        [call("leave")], [call("add", a=1, b=2)], ["Sorry."], served=[server], config={"tool_timeout_seconds": 10}
    ) as on:
        turn = await on.turn("Go")
    assert all(str(result).startswith("error: ") for result in tool_results(turn))
    assert turn.response_message.content == "Sorry."


async def test_a_call_that_never_ends_is_bounded_and_so_is_its_session() -> None:
    """The server still works at it when the turn is over."""
    server = await connected(config())
    async with stage([call("wait")], ["Sorry."], served=[server], config={"tool_timeout_seconds": 0.3}) as on:
        turn = await on.turn("Go")
    assert tool_results(turn) == ["error: the tool took longer than 0.3 s"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"command": ("/no/such/program",)}, "cannot be used"),
        ({"command": (sys.executable, "-c", "print('junk')")}, "cannot be used|did not answer"),
        ({"command": (sys.executable, "-c", "import time; time.sleep(60)"), "timeout_seconds": 0.5}, "did not answer"),
        ({"tools": ("add", "subtract")}, "has no tool subtract"),
    ],
)
async def test_a_server_that_cannot_be_used_does_not_start(settings: dict[str, Any], told: str) -> None:
    """And the operator reads why."""
    with pytest.raises(ProviderStartError, match=told):
        await connected(config(**settings))


@pytest.mark.parametrize("settings", [{}, {"command": ["x"], "url": "http://127.0.0.1/mcp"}, {"url": "file:///x"}])
def test_a_server_is_a_program_or_an_address(settings: dict[str, Any]) -> None:
    """One of the two, and nothing else."""
    with pytest.raises(ValidationError):
        McpConfig.model_validate(settings)
