"""How commands write: results to stdout as tables or JSON, errors and warnings to stderr, one a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence

import click

_MARKS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Control characters, which could move the cursor or recolour the terminal, and what stands in for them."""

Row = Mapping[str, str | int | None]


def error(text: str) -> None:
    """Say on stderr why the command was refused."""
    click.echo(f"error: {_one_line(text)}", err=True)


def warning(text: str) -> None:
    """Say on stderr what does not stop the command."""
    click.echo(f"warning: {_one_line(text)}", err=True)


def write(text: str) -> None:
    """Write what a model says, as it comes. On a terminal a control character becomes a mark, for it is not ours."""
    sys.stdout.write(text.translate(_MARKS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def show(rows: Sequence[Row], columns: Iterable[str], *, as_json: bool) -> None:
    """Write rows to stdout: a JSON array of objects, or a table of these columns with a head line."""
    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
        return
    columns = list(columns)
    cells = [[name.upper().replace("_", " ") for name in columns]]
    cells += [["-" if row[name] in (None, "") else str(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _one_line(text: str) -> str:
    return " ".join(text.split()).translate(_MARKS)
