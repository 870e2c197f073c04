"""Tools: a function as one, and those that a distribution lists."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from llama_stack.apis import Config, Inference, Safety
from llama_stack.apis.common import Attachment, Content, ToolDefinition
from llama_stack.apis.safety import RunShieldRequest, RunShieldResponse
from llama_stack.distribution import Distribution, check_distribution
from llama_stack.distribution.schema import json_schema
from llama_stack.errors import InvalidRequestError, NotFoundError, OverloadedError, ProviderStartError, UnavailableError
from llama_stack.plugins import Permission, ProviderSpec, ToolSpec, discover, hookimpl
from llama_stack.registry import NeedKind, Registry, needs
from llama_stack.stack import Stack, running
from llama_stack.testing.stub_inference import stub
from llama_stack.tools import MAX_THREADS, Tool, Tools

pytestmark = pytest.mark.anyio


def book(
    place: str, nights: Annotated[int, Field(ge=1, description="how many")] = 1, kind: Literal["room", "tent"] = "room"
) -> dict[str, Any]:
    """Book a stay.

    Paid on arrival.
    """
    return {"place": place, "nights": nights, "kind": kind}


async def test_a_function_s_types_and_words_are_the_definition() -> None:
    """Nothing about a tool is stated twice."""
    assert Tool.from_function(book).definition == ToolDefinition(
        tool_name="book",
        description="Book a stay.\n\nPaid on arrival.",
        parameters={
            "place": {"type": "string"},
            "nights": {"default": 1, "description": "how many", "minimum": 1, "type": "integer"},
            "kind": {"default": "room", "enum": ["room", "tent"], "type": "string"},
        },
    )
    assert Tool.from_function(book, name="reserve").definition.tool_name == "reserve"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "place: Field required"),
        ({"place": "Rome", "nights": 0}, "nights: Input should be greater"),
        ({"place": "Rome", "night": 2}, "night: Extra inputs"),
        ({"place": "Rome", "kind": "castle"}, "kind: Input should be 'room' or 'tent'"),
        ({"place": ["Rome"]}, "place: Input should be a valid string"),
    ],
)
async def test_arguments_that_do_not_fit_never_reach_the_function(arguments: dict[str, Any], told: str) -> None:
    """What a model writes is not checked by anybody else."""
    with pytest.raises(InvalidRequestError, match=told):
        await Tool.from_function(book).run(arguments)


async def test_a_number_that_is_written_as_text_is_taken() -> None:
    """Models write numbers in quotes; a call that means one thing only should not fail for it."""
    assert await Tool.from_function(book).run({"place": "Rome", "nights": "2"}) == (
        '{"place": "Rome", "nights": 2, "kind": "room"}'
    )


async def test_text_and_attachments_are_returned_as_they_are_and_the_rest_as_json() -> None:
    """The model reads text."""
    picture = Attachment(url="data:image/png;base64,AAAA", mime_type="image/png")
    cases: list[tuple[Callable[[], Any], Content]] = [
        (lambda: "text", "text"),
        (lambda: picture, picture),
        (lambda: ["a", picture], ["a", picture]),
        (lambda: [], "[]"),
        (lambda: None, "null"),
        (lambda: {"é": 1}, '{"é": 1}'),
        (lambda: Path("/x"), '"/x"'),
    ]
    for function, content in cases:
        assert await Tool.from_function(function, name="f").run({}) == content


async def test_an_async_function_is_awaited_and_can_be_cancelled() -> None:
    """A tool that waits must end with its turn."""
    ended = asyncio.Event()

    async def wait() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    task = asyncio.create_task(Tool.from_function(wait).run({}))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_plain_function_does_not_hold_the_event_loop() -> None:
    """It waits here for something that only the loop can do."""
    loop = asyncio.get_running_loop()

    def ask() -> int:
        return asyncio.run_coroutine_threadsafe(asyncio.sleep(0, 7), loop).result(20)

    assert await Tool.from_function(ask).run({}) == "7"


def untyped(a) -> None:  # type: ignore[no-untyped-def]
    pass


def many(*args: int) -> None:
    pass


class Nested(BaseModel):
    """A type with a schema of its own."""

    x: int


def nested(value: Nested) -> None:
    pass


@pytest.mark.parametrize("function", [untyped, many, nested])
def test_a_function_that_cannot_be_described_is_refused_at_once(function: Callable[..., Any]) -> None:
    """Not at its first call."""
    with pytest.raises(TypeError, match=function.__name__):
        Tool.from_function(function)


async def test_calls_that_never_end_take_nobody_else_s_threads() -> None:
    """Those of the server are few, and its shields and its store work in them; a tool's own are bounded too."""
    release = threading.Event()

    def hang() -> str:
        release.wait()
        return "released"

    tool = Tool.from_function(hang)
    calls = [asyncio.create_task(tool.run({})) for _ in range(MAX_THREADS)]
    try:
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="calls of 'hang' are running"):
            await tool.run({})
        assert await asyncio.to_thread(lambda: "free") == "free"
        calls[0].cancel()
        with pytest.raises(OverloadedError):  # whoever gave up on it left it running
            await tool.run({})
    finally:
        release.set()
    assert await asyncio.gather(*calls[1:]) == ["released"] * (MAX_THREADS - 1)
    assert await tool.run({}) == "released"


async def test_what_a_plain_function_raises_reaches_its_caller() -> None:
    """Whatever it is: an exception that the event loop knows must not leave the caller waiting."""

    def stop(kind: str) -> str:
        raise {"stop": StopIteration, "exit": SystemExit, "value": ValueError}[kind]

    for kind, error in (("stop", RuntimeError), ("exit", SystemExit), ("value", ValueError)):
        with pytest.raises(error):
            await Tool.from_function(stop).run({"kind": kind})


async def test_a_plain_function_knows_its_caller_s_context() -> None:
    """Such as the request that a line of the log belongs to."""
    request: ContextVar[str] = ContextVar("request", default="none")

    def read() -> str:
        return request.get()

    request.set("r1")
    assert await Tool.from_function(read).run({}) == "r1"


class Greeting(Config):
    """What is said."""

    word: str = "Hello"


class Reach(Config):
    """What is reached for."""

    hosts: tuple[str, ...] = ()
    program: bool = False


class Reaching(Tool):
    definition = ToolDefinition(tool_name="reach")

    async def run(self, arguments: Mapping[str, Any]) -> Content:
        return "reached"

    def readiness_details(self) -> Mapping[str, str]:
        return {"notice": "it reaches"}


class House:
    """A plugin with tools of every temper, and a provider that is given them."""

    def __init__(self) -> None:
        self.tools: Tools | None = None
        self.failures = 0

    @hookimpl
    def llama_stack_tools(self) -> list[ToolSpec]:
        @asynccontextmanager
        async def start_greet(config: Greeting, inference: Inference) -> AsyncIterator[Tool]:
            def say_hello(name: str) -> str:
                return f"{config.word}, {name}, from {len(inference.__class__.__name__) and 'us'}."

            yield Tool.from_function(say_hello)

        @asynccontextmanager
        async def start_broken() -> AsyncIterator[Tool]:
            self.failures += 1
            if self.failures:
                raise ProviderStartError("there is no sandbox on this machine")
            yield Tool.from_function(book)

        @asynccontextmanager
        async def start_odd() -> AsyncIterator[Tool]:
            yield object()  # type: ignore[misc]  # which is the point

        @asynccontextmanager
        async def start_reach(config: Reach) -> AsyncIterator[Tool]:
            yield Reaching()

        return [
            ToolSpec(
                name="reach",
                start=start_reach,
                config=Reach,
                permissions={
                    Permission.NETWORK: lambda config: config.hosts,
                    Permission.PROCESSES: lambda config: ["curl"] if config.program else [],
                },
            ),
            ToolSpec(name="greet", start=start_greet, config=Greeting),
            ToolSpec(name="broken", start=start_broken),
            ToolSpec(name="odd", start=start_odd),
        ]

    @hookimpl
    def llama_stack_providers(self) -> list[ProviderSpec]:
        @asynccontextmanager
        async def start_asking(tools: Tools) -> AsyncIterator[Safety]:
            self.tools = tools
            assert tools.find("say_hello")  # tools are up before whoever asks for them
            yield NoShields()

        return [ProviderSpec(api=Safety, name="asking", start=start_asking)]


class NoShields(Safety):
    async def shields(self) -> list[str]:
        return []

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        return RunShieldResponse()


def stack_of(house: House, tmp_path: Path, *tools: Mapping[str, Any]) -> Stack:
    found = Distribution.model_validate(
        {
            "version": 1,
            "name": "t",
            "providers": {"safety": [{"provider": "asking"}], "inference": [{"provider": "stub"}]},
            "tools": list(tools),
        }
    )
    return Stack(found, Registry(discover([house, stub])[:2]), state_folder=tmp_path)


async def test_a_provider_is_given_the_tools_that_the_distribution_lists(tmp_path: Path) -> None:
    """Each with its settings and its own needs, by the name that models call it by."""
    house = House()
    async with running(stack_of(house, tmp_path, {"tool": "greet", "config": {"word": "Hi"}})) as stack:
        assert house.tools is not None
        assert house.tools.names() == ["say_hello"]
        async with house.tools.find("say_hello").session() as session:
            assert await session.call("say_hello", {"name": "Ann"}) == "Hi, Ann, from us."
        with pytest.raises(NotFoundError, match="served: say_hello"):
            house.tools.find("greet")
        assert [(status.api, status.id, status.state) for status in stack.status()][-1] == ("tools", "greet", "ready")


async def test_an_optional_tool_that_cannot_start_says_why_and_stops_nothing(tmp_path: Path) -> None:
    """A machine without a sandbox runs agents without code."""
    house = House()
    entries = ({"tool": "greet"}, {"tool": "broken", "optional": True})
    async with running(stack_of(house, tmp_path, *entries)) as stack:
        assert stack.is_ready
        assert house.tools is not None
        assert house.tools.names() == ["say_hello", "broken"]
        with pytest.raises(UnavailableError, match="no sandbox on this machine"):
            house.tools.find("broken")


@pytest.mark.parametrize(("name", "told"), [("broken", "no sandbox"), ("odd", "not a subclass of Tool")])
async def test_a_required_tool_that_does_not_start_stops_the_start(name: str, told: str, tmp_path: Path) -> None:
    """As a provider does."""
    stack = stack_of(House(), tmp_path, {"tool": "greet"}, {"tool": name})
    with pytest.raises(ProviderStartError, match=told):
        await stack.start()
    await stack.stop()


def test_a_need_of_tools_is_read_off_the_annotation() -> None:
    """As every need is."""

    @asynccontextmanager
    async def start(tools: Tools) -> AsyncIterator[Safety]:
        yield NoShields()

    assert [(need.parameter, need.kind) for need in needs(start)] == [("tools", NeedKind.TOOLS)]


def test_tools_of_a_distribution_are_checked_and_in_its_schema(tmp_path: Path) -> None:
    """Misspelt, misconfigured, twice, or without what they need: told before anything starts."""
    file = tmp_path / "t.yaml"
    file.write_text(
        "version: 1\nname: t\ntools:\n  - tool: gret\n  - tool: greet\n    config: { words: x }\n  - tool: greet\n"
    )
    registry = Registry(discover([House()])[:1])
    faults = [str(fault).partition("t.yaml:")[2] for fault in check_distribution(file, environ={}, registry=registry)]
    assert [fault.partition(": ")[0] for fault in faults] == ["4:11", "5:11", "6:15", "7:11", "7:11"]
    assert "did you mean 'greet'" in faults[0]
    assert "needs the API 'inference'" in faults[1]
    assert "did you mean 'word'" in faults[2]
    assert any("is on line 5 already" in fault for fault in faults[3:])
    schema = json_schema(registry)["properties"]["tools"]
    assert {entry["title"] for entry in schema["items"]["anyOf"]} == {"reach", "greet", "broken", "odd"}


@pytest.mark.parametrize(
    ("config", "granted", "told"),
    [
        ({}, [], ""),
        ({"hosts": ["a.example"]}, ["network"], ""),
        ({"hosts": ["a.example"]}, ["network", "files"], ""),
        ({"hosts": ["a.example"], "program": True}, ["network", "processes"], ""),
        ({"hosts": ["a.example"]}, [], "asks for network, which its entry does not permit"),
        ({"hosts": ["a.example"], "program": True}, ["network"], "asks for processes, which"),
        ({"hosts": ["a.example"], "program": True}, ["files"], "asks for network, processes, which"),
    ],
)
async def test_a_tool_that_asks_for_more_than_its_entry_permits_is_refused(
    config: dict[str, Any], granted: list[str], told: str, tmp_path: Path
) -> None:
    """By the check, at the entry's place, and by the start; what it asks for depends on what it is to do."""
    entry = {"tool": "reach", "config": config, "permissions": granted}
    file = tmp_path / "t.yaml"
    file.write_text(json.dumps({"version": 1, "name": "t", "tools": [entry]}))
    faults = [str(fault) for fault in check_distribution(file, environ={}, registry=Registry(discover([House()])[:1]))]
    stack = stack_of(House(), tmp_path, {"tool": "greet"}, entry)
    if told:
        assert len(faults) == 1
        assert "tools[0].permissions" in faults[0]
        assert told in faults[0]
        with pytest.raises(ProviderStartError, match=told):
            await stack.start()
        await stack.stop()
        return
    assert faults == []
    async with running(stack):
        details = stack.status()[-1].details
        asked = ", ".join(name for name in ("network", "processes") if name in granted and config)
        assert details == ({"permissions": asked} if asked else {}) | {"notice": "it reaches"}


def test_a_permission_that_there_is_not_is_a_fault(tmp_path: Path) -> None:
    """A misspelt one would grant nothing, and look as if it did."""
    file = tmp_path / "t.yaml"
    file.write_text("version: 1\nname: t\ntools:\n  - tool: reach\n    permissions: [netwrok]\n")
    faults = [str(fault) for fault in check_distribution(file, environ={}, registry=Registry(discover([House()])[:1]))]
    assert len(faults) == 1
    assert "5:19" in faults[0]
    assert "network" in faults[0]


def test_a_plugin_that_cannot_say_what_it_asks_for_is_its_authors_fault(tmp_path: Path) -> None:
    """The check goes on, and a declaration of the wrong kind is refused where it is made."""

    @asynccontextmanager
    async def start() -> AsyncIterator[Tool]:
        yield Reaching()

    def raising(config: Config) -> list[str]:
        raise KeyError("host")

    class Careless:
        @hookimpl
        def llama_stack_tools(self) -> list[ToolSpec]:
            return [ToolSpec(name="careless", start=start, permissions={Permission.FILES: raising})]

    file = tmp_path / "t.yaml"
    file.write_text("version: 1\nname: t\ntools:\n  - tool: careless\n")
    faults = [str(f) for f in check_distribution(file, environ={}, registry=Registry(discover([Careless()])[:1]))]
    assert ["cannot say what it asks for" in fault for fault in faults] == [True]
    with pytest.raises(TypeError, match="permissions"):
        ToolSpec(name="x", start=start, permissions={"network": raising})  # type: ignore[dict-item]


async def test_an_entry_says_how_long_a_call_may_take(tmp_path: Path) -> None:
    """One tool is slow by nature, another one must not be."""
    house = House()
    entries = ({"tool": "greet"}, {"tool": "reach", "timeout_seconds": 1.5})
    async with running(stack_of(house, tmp_path, *entries)):
        assert house.tools is not None
        assert house.tools.timeout_seconds("say_hello") is None
        assert house.tools.timeout_seconds("reach") == 1.5
