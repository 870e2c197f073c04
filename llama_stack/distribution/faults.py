"""Where something stands in a distribution's files, and what is wrong there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_FAULTS = 100
"""Faults reported in one run: more of them help nobody, and a hostile file could hold thousands."""

_SECRET_KEY = re.compile(r"key|token|secret|password|passwd|credential|auth", re.IGNORECASE)
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,60}")

_LONGEST_PATH = 12

Path = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A place in a file; ``line`` and ``column`` count from 1."""

    file: str
    line: int = 1
    column: int = 1


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a distribution, and how to right it."""

    file: str
    line: int
    column: int
    key_path: str
    """Keys joined by dots, list positions in brackets: ``providers.inference[0].config``. Empty for the whole file."""
    what: str
    remedy: str

    @classmethod
    def at(cls, mark: Mark, path: Path, what: str, remedy: str) -> Fault:
        """A fault at a place; line breaks in the texts become spaces, so that a fault stays one line."""
        return cls(mark.file, mark.line, mark.column, key_path(path), _one_line(what), _one_line(remedy))

    def __str__(self) -> str:
        where = f"{self.key_path}: " if self.key_path else ""
        return f"{self.file}:{self.line}:{self.column}: {where}{self.what}; {self.remedy}"


def key_path(path: Path) -> str:
    """The path as people read it; a key with unusual characters is quoted and, when long, shortened."""
    text = ""
    for part in path[:_LONGEST_PATH]:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        shown = part if _PLAIN_KEY.fullmatch(part) else repr(shortened(part))
        text += f".{shown}" if text else shown
    return text if len(path) <= _LONGEST_PATH else f"{text}…"


def is_secret(path: Path) -> bool:
    """Whether the key's name says that its value should not be printed, though it stands in the file."""
    return bool(path) and isinstance(path[-1], str) and _SECRET_KEY.search(path[-1]) is not None


def shortened(text: str, limit: int = 60) -> str:
    """The text, cut to ``limit`` characters with an ellipsis when it is longer."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def in_order(faults: Iterable[Fault], files: list[str]) -> list[Fault]:
    """The faults by file (in the order given), line and column, each once, at most ``MAX_FAULTS`` of them."""
    rank = {file: position for position, file in enumerate(files)}
    unique = list(dict.fromkeys(faults))
    unique.sort(key=lambda fault: (rank.get(fault.file, len(rank)), fault.line, fault.column))
    if len(unique) > MAX_FAULTS:
        last = unique[MAX_FAULTS]
        left = len(unique) - MAX_FAULTS
        more = Fault(last.file, last.line, last.column, "", f"{left} more faults follow", "right those above first")
        return [*unique[:MAX_FAULTS], more]
    return unique


def _one_line(text: str) -> str:
    return " ".join(text.split())
