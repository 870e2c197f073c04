"""A full-text index over a folder of documents, for ``web_search`` where there is no web: SQLite's FTS5, in memory.

It is made anew at each start, so it is never older than the folder was then. Plain text, Markdown and HTML are read;
what else lies in the folder is counted and left alone, and so are links and hidden files.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

from pydantic import Field

from llama_stack.apis import Config
from llama_stack.errors import ProviderStartError

from .search_engines import Hit

TEXTS = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".csv", ".json"})
PAGES = frozenset({".html", ".htm", ".xhtml"})
MAX_WORDS = 32
"""How many words of a question are looked for."""
SNIPPET_WORDS = 60
_WORD = re.compile(r"\w+")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.{1,200})$", re.MULTILINE)


class LocalConfig(Config):
    """Documents on this machine."""

    kind: Literal["local"]
    folder: Path
    """An absolute folder: its text, Markdown and HTML files, and those of the folders in it, are searched."""
    max_documents: int = Field(default=10_000, ge=1, le=1_000_000)
    """The most files that are read; with more of them the tool does not start."""
    max_bytes: int = Field(default=256 * 1024**2, ge=1, le=16 * 1024**3)
    """The most that they may hold together; the index takes more than twice that in memory."""


@dataclass(frozen=True)
class _Document:
    path: str
    title: str
    text: str


class LocalIndex:
    """The documents of a folder, by their words. ``indexed`` makes it."""

    def __init__(self, table: sqlite3.Connection, documents: int, left_out: int) -> None:
        self._table = table
        self._one_query = threading.Lock()
        self.documents = documents
        self.left_out = left_out
        """Files that are of no kind that is read."""

    @property
    def name(self) -> str:
        return f"a local index of {self.documents} documents"

    async def search(self, query: str, count: int) -> Sequence[Hit]:
        """Those that hold any of the words, by BM25; the title counts five times."""
        return await asyncio.to_thread(self._search, query, count)

    def close(self) -> None:
        """Free the memory, once nobody searches any more."""
        with self._one_query:
            self._table.close()

    def _search(self, query: str, count: int) -> list[Hit]:
        words = _WORD.findall(query)[:MAX_WORDS]
        if not words:
            return []
        asked = " OR ".join(f'"{word}"' for word in words)  # a word has no quotes in it, and in quotes is no operator
        with self._one_query:
            rows = self._table.execute(
                "SELECT title, path, snippet(documents, 2, '', '', ' … ', ?) FROM documents"
                " WHERE documents MATCH ? ORDER BY bm25(documents, 0.0, 5.0, 1.0) LIMIT ?",
                (SNIPPET_WORDS, asked, count),
            )
            return [Hit(title, path, text) for title, path, text in rows]


async def indexed(config: LocalConfig) -> LocalIndex:
    """Read the folder. Raises ``ProviderStartError`` where there is none, or it holds too much."""
    if not config.folder.is_absolute() or not config.folder.is_dir():
        raise ProviderStartError(f"{config.folder} is not a folder of this machine; name an absolute one")
    return await asyncio.to_thread(_indexed, config)


def _indexed(config: LocalConfig) -> LocalIndex:
    table = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        table.execute(
            "CREATE VIRTUAL TABLE documents USING fts5"
            "(path UNINDEXED, title, text, tokenize='porter unicode61 remove_diacritics 2')"
        )
    except sqlite3.OperationalError as error:
        raise ProviderStartError("Python's SQLite has no FTS5 on this machine") from error
    files, left_out = _files(config)
    for file in files:
        document = _document(config.folder, file)
        table.execute("INSERT INTO documents VALUES (?, ?, ?)", (document.path, document.title, document.text))
    return LocalIndex(table, len(files), left_out)


def _files(config: LocalConfig) -> tuple[list[Path], int]:
    found, left_out, held_bytes = [], 0, 0
    for file in _regular(config.folder):
        if file.suffix.lower() not in TEXTS | PAGES:
            left_out += 1
            continue
        found.append(file)
        held_bytes += file.stat().st_size
        if len(found) > config.max_documents:
            raise ProviderStartError(f"{config.folder} has more than {config.max_documents} documents (max_documents)")
        if held_bytes > config.max_bytes:
            raise ProviderStartError(f"{config.folder} holds more than {config.max_bytes} bytes (max_bytes)")
    return found, left_out


def _regular(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(place, name)
            if not name.startswith(".") and not file.is_symlink() and file.is_file():
                yield file


def _document(folder: Path, file: Path) -> _Document:
    try:
        text = file.read_bytes().decode("utf-8", errors="replace").replace("\0", " ")
    except OSError as error:
        raise ProviderStartError(f"{file} cannot be read: {error.strerror}") from error
    path = str(file.relative_to(folder)).encode("utf-8", errors="replace").decode()
    if file.suffix.lower() in PAGES:
        page = _Page()
        page.feed(text)
        page.close()
        return _Document(path, page.title.strip() or file.stem, " ".join(page.parts))
    heading = _HEADING.search(text, 0, 10_000)
    return _Document(path, heading[1].strip() if heading else file.stem, text)


class _Page(HTMLParser):
    """The text of a page."""

    _SILENT = frozenset({"script", "style", "template", "noscript"})

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.parts: list[str] = []
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._inside is None and (tag in self._SILENT or tag == "title"):
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "title":
            self.title += data
        elif self._inside is None and (part := data.strip()):
            self.parts.append(part)
