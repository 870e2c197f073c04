"""Reads the rows of a file in a process of its own, started by ``rows.py`` as a script that imports nothing of ours.

Its arguments are the file's descriptor and the memory that it may have; on stdin it gets a line of JSON: ``form``
(``jsonl``, ``csv`` or ``parquet``), ``columns`` (the kind of each by name), ``offset``, ``limit``, ``row_bytes`` and
``output_bytes``. It writes a line for each row, ``=`` and the row as a JSON object; at the end a line ``.``, or, where
it cannot go on, ``!`` and an object with the ``reason``, and the ``row`` (from 1) and ``column`` where it can tell. A
line ``~`` now and then says that it is still leaving out rows.
What ends without either has crashed. Whether a row fits its columns is the parent's to check.
"""

from __future__ import annotations

import csv
import io
import json
import resource
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

Rows = Iterator[bytes | None]
"""Rows as JSON objects; None for some that were left out."""
BATCH_ROWS = 64
"""How many rows of a Parquet file are in memory as JSON at a time."""
SKIPPED_ROWS = 10_000
"""After how many rows that are left out it says so."""
_TOO_MUCH = "takes more memory than reading a row may take"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RefusedError(Exception):
    """The file cannot be read any further; the text says why."""

    def __init__(self, reason: str, row: int | None = None, column: str | None = None) -> None:
        super().__init__(reason)
        self.row = row
        self.column = column


def read_jsonl(file: IO[bytes], request: dict[str, Any]) -> Rows:
    """One object a line; blank lines are none."""
    most = request["row_bytes"]
    number = 0
    for line in iter(lambda: file.readline(most + 2), b""):
        if number == 0:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        line = line.strip(b" \t\r\n")
        if not line:
            continue
        number += 1
        if len(line) > most:
            raise _too_large(number, most)
        if number > request["offset"]:
            if not isinstance(_parsed(line, number), dict):
                raise RefusedError("is JSON, and no object", number)
            yield line
        elif number % SKIPPED_ROWS == 0:
            yield None


def read_csv(file: IO[bytes], request: dict[str, Any]) -> Rows:
    """The first row names the columns; cells of ``number``, ``json`` and ``dialog`` columns hold JSON."""
    most = request["row_bytes"]
    csv.field_size_limit(most)
    text = io.TextIOWrapper(file, "utf-8-sig", "strict", newline="")
    number = 0

    def lines() -> Iterator[str]:
        for line in iter(lambda: text.readline(most + 2), ""):
            if len(line) > most + 1:
                raise _too_large(number + 1, most)
            yield line

    try:
        rows = csv.reader(lines(), strict=True)
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise RefusedError("names a column twice in its first line")
        for cells in rows:
            if not cells:
                continue
            number += 1
            if len(cells) != len(names):
                raise RefusedError(f"has {len(cells)} cells, and the first line names {len(names)} columns", number)
            if number > request["offset"]:
                yield _dumped(dict(zip(names, _values(names, cells, request["columns"], number), strict=True)))
            elif number % SKIPPED_ROWS == 0:
                yield None
    except csv.Error as error:
        raise RefusedError(f"is no valid CSV: {error}", number + 1) from None
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"or one soon after it is not UTF-8: byte {error.object[error.start]:#04x}", number + 1
        ) from None


def _values(names: list[str], cells: list[str], kinds: dict[str, str], number: int) -> Iterator[Any]:
    for name, cell in zip(names, cells, strict=True):
        yield _parsed(cell, number, name) if kinds.get(name) in ("number", "json", "dialog") else cell


def read_parquet(file: IO[bytes], request: dict[str, Any]) -> Rows:
    """The rows of all row groups, a small batch at a time."""
    try:
        import arro3.io
    except ImportError:
        raise RefusedError(
            "is Parquet, and that is read only where arro3-io is installed: pip install 'llama-stack-data[parquet]'"
        ) from None
    batches = arro3.io.read_parquet(file, batch_size=BATCH_ROWS)
    for name in batches.schema.names:
        if "Binary" in str(batches.schema.field(name).type):
            raise RefusedError("holds bytes; only text, numbers, times, lists and structs are read", None, name)
    dialogs = [name for name, kind in request["columns"].items() if kind == "dialog"]
    number, written = 0, 0
    for batch in batches:
        skipped = min(max(request["offset"] - number, 0), batch.num_rows)
        number += skipped
        if skipped == batch.num_rows:
            yield None
        else:
            buffer = io.BytesIO()
            arro3.io.write_ndjson(batch.slice(skipped), buffer, explicit_nulls=True)
            written += buffer.tell()
            if written > request["output_bytes"]:
                raise RefusedError("unpacks to far more than its size", number + 1)
            for line in buffer.getvalue().rstrip(b"\n").split(b"\n"):
                number += 1
                yield _with_dialogs(line, dialogs, number) if dialogs else line


def _with_dialogs(line: bytes, names: list[str], number: int) -> bytes:
    """The row with its dialogs as JSON has them: a struct of Parquet has every key, where a message leaves some out."""
    row = json.loads(line)
    for name in names:
        cell = row.get(name)
        row[name] = _parsed(cell, number, name) if isinstance(cell, str) else _without_nulls(cell)
    return _dumped(row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[IO[bytes], dict[str, Any]], Rows]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}


def _parsed(text: str | bytes, row: int, column: str | None = None) -> Any:
    try:
        return _DECODER.decode(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise RefusedError(f"is not UTF-8: its byte {error.start} does not fit", row, column) from None
    except RecursionError:
        raise RefusedError("is nested too deep", row, column) from None
    except ValueError as error:
        raise RefusedError(f"is no valid JSON: {error}", row, column) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def _dumped(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _too_large(row: int, most: int) -> RefusedError:
    return RefusedError(f"has more than {most} bytes", row)


def _write_rows(file: IO[bytes], request: dict[str, Any], answers: IO[bytes]) -> dict[str, Any] | None:
    """Write the rows; what went wrong, or None."""
    number = request["offset"]
    try:
        most = sys.maxsize if request["limit"] is None else number + request["limit"]
        for line in READERS[request["form"]](file, request) if number < most else ():
            if line is None:
                answers.write(b"~\n")
                answers.flush()
                continue
            number += 1
            if len(line) > request["row_bytes"]:
                raise _too_large(number, request["row_bytes"])
            answers.write(b"=" + line + b"\n")
            if number == most:
                break
    except RefusedError as error:
        return {"reason": str(error), "row": error.row, "column": error.column}
    except MemoryError:
        return {"reason": _TOO_MUCH, "row": number + 1}
    except BrokenPipeError:  # nobody wants the rest
        raise
    except BaseException as error:  # a file can make a library raise anything, a Rust panic among it
        if "MemoryError" in str(error):  # it came through a library
            return {"reason": _TOO_MUCH, "row": number + 1}
        said = " ".join(str(error).split())[:200].encode("utf-8", "replace").decode()
        return {"reason": f"is no valid {request['form']}: {said or type(error).__name__}"}
    return None


def main() -> None:
    """Write the rows of the file to stdout."""
    descriptor, memory = map(int, sys.argv[1:])
    request = json.loads(sys.stdin.buffer.readline())
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(kind, (most, most))
    answers = sys.stdout.buffer
    with open(descriptor, "rb") as file:
        file.seek(0)
        fault = _write_rows(file, request, answers)
    answers.write(b".\n" if fault is None else b"!" + json.dumps(fault).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
