"""Tools: what an agent can do for a model.

A plugin declares a tool with a ``ToolSpec``; a distribution lists it under ``tools:``; a start function that has a
parameter annotated with ``Tools`` is given all of them. A Python function with types and a docstring is a tool::

    def add(a: int, b: int) -> int:
        \"\"\"Add two numbers.\"\"\"
        return a + b

    Tool.from_function(add)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import StrEnum
from typing import Any, Protocol, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from .apis.common import Attachment, Content, ToolDefinition
from .errors import InvalidRequestError, NotFoundError, OverloadedError, listed

MAX_THREADS = 64
"""How many calls of one plain function run at a time."""


class Permission(StrEnum):
    """What a tool touches beside its arguments. Its plugin declares it, and the distribution's entry grants it.

    A tool that asks for one that its entry does not grant is not started. Code that runs in this process is not held to
    what it declares: who installs a plugin trusts it with that.
    """

    NETWORK = "network"
    """It connects to other servers."""
    FILES = "files"
    """It reads or writes files of this machine."""
    PROCESSES = "processes"
    """It starts programs."""


class ToolSession(Protocol):
    """Tools for the length of a turn."""

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        """What the tool of that name answers. Raises ``StackError`` where the model should read why it did not work.

        Arguments are what the model wrote, and nobody has checked them. Cancelling the call stops the work.
        """
        ...


class ToolSource(ABC):
    """One or more tools that share a session, such as those of one server."""

    @property
    @abstractmethod
    def definitions(self) -> Sequence[ToolDefinition]:
        """The tools' names and arguments, as the model is told of them."""

    @abstractmethod
    def session(self) -> AbstractAsyncContextManager[ToolSession]:
        """The tools for the length of a turn. It is entered at the turn's first call, and left by the same task."""

    def readiness_details(self) -> Mapping[str, str]:
        """What readiness shall say of these tools, as ``Api.readiness_details`` has it: what stands in for what."""
        return {}


class Tool(ToolSource):
    """Something that an agent can do for a model."""

    @property
    @abstractmethod
    def definition(self) -> ToolDefinition:
        """The tool's name and arguments, as the model is told of them."""

    @abstractmethod
    async def run(self, arguments: Mapping[str, Any]) -> Content:
        """What the tool answers, as ``ToolSession.call`` has it."""

    @property
    def definitions(self) -> Sequence[ToolDefinition]:
        return (self.definition,)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[ToolSession]:
        """The tool itself. One that keeps something between the calls of a turn yields another."""
        yield self

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        """``run``, for a session of one tool."""
        return await self.run(arguments)

    @staticmethod
    def from_function(function: Callable[..., Any], *, name: str | None = None) -> Tool:
        """A tool that calls a function, plain or async; its types are the schema, its docstring the description.

        A plain function runs in a thread of its own, which nobody can stop: where ``MAX_THREADS`` of a tool's calls are
        running it is refused with ``OverloadedError``. What it returns is sent as text, or else as JSON. Raises
        ``TypeError`` for a parameter that has no type, and for types that need more than one schema.
        """
        return _FunctionTool(function, name or function.__name__)


class ToolBackend(Protocol):
    """An entry under ``tools:``, running or not."""

    id: str
    timeout_seconds: float | None
    """How long a call may take, where the distribution says it of this entry."""

    @property
    def is_running(self) -> bool: ...

    def running(self) -> ToolSource:
        """What was started. Raises ``UnavailableError`` with the reason while there is none."""
        ...


class Tools:
    """The tools of a distribution, by the name that models call them by."""

    def __init__(self, backends: Sequence[ToolBackend] = ()) -> None:
        self._backends = tuple(backends)

    def names(self) -> list[str]:
        """The tools that the distribution lists, whether they are up or not."""
        return [name for backend in self._backends for name in _names(backend)]

    def find(self, name: str) -> ToolSource:
        """Where the tool of that name is from. Raises ``NotFoundError``, and ``UnavailableError`` while it is down."""
        return self._backend(name).running()

    def definition(self, name: str) -> ToolDefinition:
        """What the tool of that name says of itself. Raises as ``find`` does."""
        return next(each for each in self.find(name).definitions if each.tool_name == name)

    def timeout_seconds(self, name: str) -> float | None:
        """How long a call may take, where the distribution says it of this tool. Raises as ``find`` does."""
        return self._backend(name).timeout_seconds

    def _backend(self, name: str) -> ToolBackend:
        for backend in self._backends:
            if name in _names(backend):
                return backend
        raise NotFoundError(f"tool {name!r} is not served here; served: {listed(self.names())}", param="tool_name")


def _names(backend: ToolBackend) -> list[str]:
    """The entry's own name stands for its tools while it is down, for nobody knows them then."""
    return [each.tool_name for each in backend.running().definitions] if backend.is_running else [backend.id]


class _FunctionTool(Tool):
    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._function = function
        self._threads = threading.BoundedSemaphore(MAX_THREADS)
        self._arguments = _model_of(function, name)
        schema = self._arguments.model_json_schema()
        if "$defs" in schema:
            raise TypeError(f"tool {name!r}: give its parameters plain types, lists or dicts")
        self._definition = ToolDefinition(
            tool_name=name,
            description=inspect.getdoc(function),
            parameters={key: _untitled(value) for key, value in schema.get("properties", {}).items()},
        )

    @property
    def definition(self) -> ToolDefinition:
        return self._definition

    async def run(self, arguments: Mapping[str, Any]) -> Content:
        try:
            values = self._arguments.model_validate(dict(arguments))
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)
            )
            raise InvalidRequestError(f"the arguments are not valid: {faults}") from error
        called = {key: getattr(values, key) for key in type(values).model_fields}
        if inspect.iscoroutinefunction(self._function):
            result = await self._function(**called)
        else:
            result = await self._in_thread(called)
        return _content(result)

    async def _in_thread(self, arguments: dict[str, Any]) -> Any:
        """Not in the threads that the whole server shares: calls that never end would take all of those."""
        if not self._threads.acquire(blocking=False):
            raise OverloadedError(f"{MAX_THREADS} calls of {self._definition.tool_name!r} are running; try again later")
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                done.set_result(context.run(self._function, **arguments))
            except BaseException as error:  # also SystemExit: it is the caller's to judge
                done.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
            finally:
                self._threads.release()

        done.set_running_or_notify_cancel()  # a caller that gives up cannot take the result's place away
        try:
            threading.Thread(target=work, name=f"tool {self._definition.tool_name}", daemon=True).start()
        except RuntimeError:  # the process may have no further thread
            self._threads.release()
            raise
        return await asyncio.wrap_future(done)


def _model_of(function: Callable[..., Any], name: str) -> type[BaseModel]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        is_plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not is_plain or parameter.name not in hints:
            raise TypeError(f"tool {name!r}: parameter {parameter.name!r} needs a type and a name of its own")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _untitled(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "title"}


def _content(result: Any) -> Content:
    if isinstance(result, str | Attachment):
        return result
    if isinstance(result, list) and result and all(isinstance(item, str | Attachment) for item in result):
        return result
    return json.dumps(result, ensure_ascii=False, default=str)
