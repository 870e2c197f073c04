"""The rows of a file as they are read, each checked against its columns.

The file is read by ``reader.py`` in a child process with limits, for a file may be anybody's and larger than memory:
what is too large, too slow or too much for a parser is an error of that one file. What comes out of the child are JSON
objects, which are checked here, in threads, some at a time.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, ConfigDict, JsonValue, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict

from llama_stack.apis.common import URL, Attachment, Message
from llama_stack.apis.datasets import ColumnKind
from llama_stack.children import end_child
from llama_stack.errors import InvalidRequestError, OverloadedError, UnreadableDocumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..config import RowLimits

CHUNK_BYTES = 256 * 1024
"""How much of the child's output is taken and checked at a time."""
WAIT_SECONDS = 30.0
"""How long a read waits for another one to end where as many run as may."""
FREE_OUTPUT_BYTES = 64 * 1024 * 1024
"""A file may unpack to this much, whatever its size."""


def _number(value: JsonValue) -> JsonValue:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"this is {'null' if value is None else f'a {type(value).__name__}'}")
    if not math.isfinite(value) or (isinstance(value, int) and not -(2**63) <= value < 2**64):
        raise ValueError("this one is not")
    return value


_CELLS: Mapping[ColumnKind, Any] = {
    ColumnKind.DIALOG: list[Message],
    ColumnKind.TEXT: str,
    ColumnKind.MEDIA: URL | Attachment,
    ColumnKind.NUMBER: Annotated[JsonValue, AfterValidator(_number)],
    ColumnKind.JSON: JsonValue,
}
_WORDS: Mapping[ColumnKind, str] = {
    ColumnKind.DIALOG: "a dialog is a list of messages",
    ColumnKind.TEXT: "a text is a string",
    ColumnKind.MEDIA: "media is a URL, or an object of url and mime_type",
    ColumnKind.NUMBER: "a number is finite, and within 64 bits where it is whole",
    ColumnKind.JSON: "json is any value",
}

Row = dict[str, JsonValue]


class Form(StrEnum):
    """How the rows of a file are written down."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


@dataclass(frozen=True)
class Span:
    """Which of the rows are wanted."""

    offset: int = 0
    limit: int | None = None


class RowCheck:
    """Whether rows have exactly these columns, each with cells of its kind."""

    def __init__(self, columns: Mapping[str, ColumnKind]) -> None:
        self._columns = columns
        shape: Any = TypedDict("Row", {name: _CELLS[kind] for name, kind in columns.items()})  # type: ignore[misc]
        settings = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        self._adapter: TypeAdapter[Any] = TypeAdapter(with_config(settings)(shape))

    def check(self, line: bytes, number: int) -> Row:
        """A row as it was written. Raises ``InvalidRequestError``, which names row and column; rows count from 1."""
        try:
            self._adapter.validate_json(line)
        except ValidationError as error:
            raise self._fault(error, number) from None
        row: Row = from_json(line, allow_inf_nan=False)
        return row

    def check_all(self, lines: Sequence[bytes], before: int) -> tuple[list[Row], InvalidRequestError | None]:
        """The child's rows that come before the first faulty one, and its error."""
        rows: list[Row] = []
        try:
            for line in lines:
                rows.append(self.check(line[1:], before + len(rows) + 1))
        except InvalidRequestError as error:
            return rows, error
        return rows, None

    def _fault(self, error: ValidationError, number: int) -> InvalidRequestError:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if not first["loc"]:
            return faulty_row(number, None, first["msg"])
        column, *inner = [str(part) for part in first["loc"]]
        kind = self._columns.get(column)
        if first["type"] == "missing" and not inner:
            return faulty_row(number, column, "the row lacks this column")
        if kind is None:
            return faulty_row(number, column, "the dataset does not declare this column; declare it, or leave it out")
        place = "" if kind not in (ColumnKind.DIALOG, ColumnKind.JSON) or not inner else f" at /{'/'.join(inner)}"
        return faulty_row(number, column, f"{_WORDS[kind]};{place} {first['msg'][:1].lower()}{first['msg'][1:]}")


def faulty_row(number: int, column: str | None, what: str) -> InvalidRequestError:
    """The error for a row; a program finds the place in its ``row`` and ``column``."""
    where = f"row {number}" if column is None else f"row {number}, column {column!r}"
    extra = {"row": number} | ({} if column is None else {"column": column})
    return InvalidRequestError(f"{where}: {what}", param="dataset", extra=extra)


class RowReader:
    """Reads files, so many at a time as the limits say."""

    def __init__(self, limits: RowLimits) -> None:
        self._limits = limits
        self._free = asyncio.Semaphore(limits.readers)

    async def rows(
        self, file: IO[bytes], form: Form, columns: Mapping[str, ColumnKind], span: Span
    ) -> AsyncGenerator[Row, None]:
        """The rows in their order; closing the iterator ends the child.

        Raises ``InvalidRequestError`` for a row that does not fit its columns, ``UnreadableDocumentError`` for a file
        that cannot be read, and ``OverloadedError`` when too many are read already.
        """
        check = RowCheck(columns)
        number = span.offset
        last = b""
        async with self._slot(), self._child(file, form, columns, span) as child:
            held = bytearray()
            while not last and (lines := await self._lines(child, held)):
                if lines[-1][:1] in (b".", b"!"):
                    *lines, last = lines
                lines = [line for line in lines if line[:1] == b"="]
                checked, fault = await asyncio.to_thread(check.check_all, lines, number)
                for row in checked:
                    yield row
                if fault is not None:
                    raise fault
                number += len(lines)
        if last[:1] == b"!":
            raise _refused(json.loads(last[1:]))
        if not last:
            raise UnreadableDocumentError(
                f"the content cannot be read: after row {number} it crashed the reader, or took too much memory",
                param="dataset",
            )

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            raise OverloadedError(f"{self._limits.readers} datasets are being read already; try again later") from None
        try:
            yield
        finally:
            self._free.release()

    @asynccontextmanager
    async def _child(
        self, file: IO[bytes], form: Form, columns: Mapping[str, ColumnKind], span: Span
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        size = os.fstat(file.fileno()).st_size
        request = {
            "form": form,
            "columns": columns,
            "offset": span.offset,
            "limit": span.limit,
            "row_bytes": self._limits.row_bytes,
            "output_bytes": max(FREE_OUTPUT_BYTES, int(self._limits.ratio * size)),
        }
        script = str(Path(__file__).with_name("reader.py"))
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", script, str(file.fileno()), str(self._limits.memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=(file.fileno(),),
            env={},
            cwd="/",
            start_new_session=True,  # a Ctrl-C in the terminal is for the server
        )
        try:
            assert child.stdin is not None
            with suppress(BrokenPipeError, ConnectionResetError):  # it crashed: its missing answer says so
                child.stdin.write(json.dumps(request).encode() + b"\n")
                await child.stdin.drain()
            yield child
        except BaseException:  # it is in the middle of something; otherwise it has written its last line, and ends
            await end_child(child)
            raise
        finally:
            await child.wait()

    async def _lines(self, child: asyncio.subprocess.Process, held: bytearray) -> list[bytes]:
        """The next whole lines, none at the end of the output; ``held`` keeps what has come of the line after them."""
        assert child.stdout is not None
        while True:
            try:
                async with asyncio.timeout(self._limits.seconds):
                    chunk = await child.stdout.read(CHUNK_BYTES)
            except TimeoutError:
                what = f"the content cannot be read: a row takes more than {self._limits.seconds:g} s"
                raise UnreadableDocumentError(what, param="dataset") from None
            if not chunk:
                return []
            whole, newline, rest = chunk.rpartition(b"\n")
            if newline:
                lines = (bytes(held) + whole).split(b"\n")
                held[:] = rest
                return lines
            held += rest


def _refused(fault: Mapping[str, Any]) -> InvalidRequestError:
    if fault.get("row") is not None:
        return faulty_row(fault["row"], fault.get("column"), f"it {fault['reason']}")
    where = "the content" if fault.get("column") is None else f"column {fault['column']!r}"
    return UnreadableDocumentError(f"{where} cannot be read: it {fault['reason']}", param="dataset")
