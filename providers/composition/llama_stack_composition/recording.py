"""A file of calls and their answers: one JSON object a line, written as they end, read whole.

A line has ``call`` (operation and arguments), and ``value``, ``items`` or ``error``. What is no operation of the
contract, such as the list of models, is under ``asked``.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, get_type_hints

from pydantic import TypeAdapter

from llama_stack.apis import Api, Shape
from llama_stack.errors import NotFoundError, SetupError, StackError

from .forwarding import Call, forwarding

A = TypeVar("A", bound=Api)

_LONGEST_LINE = 256 * 1024 * 1024
logger = logging.getLogger("llama_stack.composition")


class Recording:
    """A file that is being written. A line is whole or not there: it is written in one call, and flushed."""

    def __init__(self, file: str) -> None:
        self._path = Path(file).expanduser()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise SetupError(f"record: {self._path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def add(self, asked: Call, *, value: Any = None, error: BaseException | None = None) -> None:
        """Write one call. Where the disk does not take it, the client still has its answer, and the log says so."""
        line: dict[str, Any] = {"call": asked.key()}
        operation = asked.operation
        if asked.is_stream:
            adapter = operation.result_adapter if operation.shape is Shape.LINES else operation.chunk_adapter
            line["items"] = [adapter.dump_python(item, mode="json", exclude_none=True) for item in value or ()]
        elif error is None and operation.shape is not Shape.VOID:
            line["value"] = operation.result_adapter.dump_python(value, mode="json", exclude_none=True)
        if isinstance(error, StackError):
            line["error"] = {"code": error.code, "detail": error.detail}
        elif error is not None:
            line["error"] = {"code": "internal", "detail": ""}
        self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Write a line."""
        try:
            os.write(self._file, json.dumps(line, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            logger.error("record: %s does not take a call: %s", self._path, error.strerror)


def recorded(made: A, provider: Api, recording: Recording) -> A:
    """The wrapper, whose answers to ``models`` and the like are written too."""
    for name, adapter in _others(type(made)).items():
        setattr(made, name, _written(name, adapter, provider, recording))
    return made


def replayed(api: type[A], file: str, *, repeats: bool) -> A:
    """A provider that answers from a file. Raises ``SetupError`` for a file that is none."""
    calls, asked = _read(Path(file).expanduser())

    async def handle(one: Call) -> Any:
        line = _next(calls, one.key(), repeats)
        if line is None:
            raise NotFoundError(f"this call of {one.operation.key} is not in the recording", param="call")
        error = line.get("error")
        items = line.get("items")
        operation = one.operation
        if one.is_stream:
            adapter = operation.result_adapter if operation.shape is Shape.LINES else operation.chunk_adapter
            return _each([adapter.validate_json(json.dumps(item)) for item in items or ()], error)
        if error is not None:
            raise StackError.revive(str(error["code"]), str(error["detail"]))
        return (
            None if operation.shape is Shape.VOID else operation.result_adapter.validate_json(json.dumps(line["value"]))
        )

    made = forwarding(api, handle, ())
    for name, adapter in _others(type(made)).items():
        setattr(made, name, _answered(name, adapter, asked))
    return made


def _read(path: Path) -> tuple[dict[str, deque[dict[str, Any]]], dict[str, Any]]:
    calls: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
    asked: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            for number, text in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
                if not text.endswith(b"\n"):  # the writer was cut off in the middle of it
                    logger.warning("replay: %s: line %d is not whole and is left out", path, number)
                    continue
                line = json.loads(text)
                if "asked" in line:
                    asked[line["asked"]] = line["value"]
                else:
                    calls[line["call"]].append(line)
    except OSError as error:
        raise SetupError(f"replay: {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(f"replay: {path}: line {number} is no recorded call") from error
    return calls, asked


def _next(calls: dict[str, deque[dict[str, Any]]], key: str, repeats: bool) -> dict[str, Any] | None:
    lines = calls.get(key)
    if not lines:
        return None
    return lines[0] if repeats and len(lines) == 1 else lines.popleft()


async def _each(items: list[Any], error: dict[str, Any] | None) -> AsyncIterator[Any]:
    for item in items:
        yield item
    if error is not None:
        raise StackError.revive(str(error["code"]), str(error["detail"]))


def _others(made: type[Api]) -> dict[str, TypeAdapter[Any]]:
    """The methods of a contract that are no operations and take nothing, with the type of what they answer."""
    contract = made.__mro__[1]
    found: dict[str, TypeAdapter[Any]] = {}
    for name in ("models", "shields"):
        method = getattr(contract, name, None)
        if method is not None:
            found[name] = TypeAdapter(get_type_hints(method)["return"])
    return found


def _written(name: str, adapter: TypeAdapter[Any], provider: Api, recording: Recording) -> Any:
    last: list[Any] = []

    async def method() -> Any:
        answer = await getattr(provider, name)()
        value = adapter.dump_python(answer, mode="json", exclude_none=True)
        if [value] != last:
            last[:] = [value]
            recording.write({"asked": name, "value": value})
        return answer

    return method


def _answered(name: str, adapter: TypeAdapter[Any], asked: dict[str, Any]) -> Any:
    async def method() -> Any:
        return adapter.validate_json(json.dumps(asked.get(name, [])))

    return method
