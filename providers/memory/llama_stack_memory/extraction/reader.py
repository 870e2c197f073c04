"""Reads documents in a process of its own, started by ``extractor.py`` as a script: it imports nothing of the stack.

It takes requests on stdin and answers on stdout until stdin ends. A request is a line of JSON (``kind``, ``charset``,
``size``, and the limits ``characters``, ``ratio``, ``pages`` and ``seconds``) and ``size`` bytes of content; an answer
a line of JSON, ``{"size": n}`` followed by n bytes of UTF-8, or ``{"reason": "..."}``. Memory is limited for the life
of the process. Whatever exception a file makes a library raise is a reason; a crash or a hang is the parent's to see,
and where there is no parent any more, a hang ends by itself.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

CHARSETS = re.compile(
    r"ascii|utf-(8(-sig)?|(16|32)(-[lb]e)?)|iso8859-\d+|cp(125\d|437|850|852|866|874|932|949|950)|koi8-[ru]"
    r"|shift_jis|euc_(jp|kr)|iso2022_(jp|kr)|gb(2312|k|18030)|big5|mac-roman"
)
"""Of Python's codecs those of texts; others among them decompress, or take quadratic time."""
RATIO_FREE_CHARACTERS = 1_000_000
"""Texts up to this length may be of any size beside their document."""
GRACE_SECONDS = 1
"""How much longer a document may take than its parent waits: where that was killed, nobody else ends this process."""
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_BLOCKS = (
    "address,article,aside,blockquote,br,caption,dd,div,dl,dt,figcaption,figure,footer,form,h1,h2,h3,h4,h5,h6,header,hr,"
    "li,main,nav,ol,p,pre,section,table,td,th,title,tr,ul"
)
"""Where a line ends in what people see."""
_UNSEEN = ["script", "style", "template", "noscript", "iframe", "object", "svg"]


class RefusedError(Exception):
    """The document cannot be read; the text says why."""


class Text:
    """The text as far as it was read, in pieces; refuses to grow beyond its limit."""

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit
        self._pieces: list[str] = []

    def add(self, piece: str) -> None:
        self._left -= len(piece)
        if self._left < 0:
            raise RefusedError(f"its text has more than {self._limit} characters, too many for its size")
        self._pieces.append(piece)

    def __str__(self) -> str:
        return "".join(self._pieces)


def decode(content: bytes, charset: str | None) -> str:
    """The bytes as text, by default UTF-8. Raises ``RefusedError``, which says where the first wrong byte is."""
    try:
        codec = codecs.lookup(charset or "utf-8")
        if codec.name == "utf-8":
            codec = codecs.lookup("utf-8-sig")  # a byte order mark is no part of the text
    except (LookupError, ValueError):
        raise RefusedError(f"charset {charset!r} is not known") from None
    if not CHARSETS.fullmatch(codec.name):
        raise RefusedError(f"charset {charset!r} is not one of texts")
    try:
        text = codec.decode(content, "strict")[0]
    except UnicodeDecodeError as error:
        raise RefusedError(f"it is not {codec.name.removesuffix('-sig')}: byte {error.start} does not fit") from None
    if "\0" in text:
        raise RefusedError(f"it is not text: character {text.index(chr(0))} is U+0000")
    return text


def read_html(content: bytes, charset: str | None, text: Text, pages: int) -> None:
    """What a reader of the page sees, a line for each block."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(decode(content, charset or _own_charset(content)))
    tree.strip_tags(_UNSEEN)
    for node in tree.css(_BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    if tree.root is None:
        return
    for line in tree.root.text(deep=True).splitlines():
        if words := " ".join(line.split()):
            text.add(words + "\n")


def _own_charset(content: bytes) -> str | None:
    """What an HTML page says of itself: by a byte order mark, else in a ``meta`` element (HTML Standard, 13.2.3)."""
    for mark, marked in _MARKS.items():
        if content.startswith(mark):
            return marked
    found = _META_CHARSET.search(content, 0, 1024)
    charset = found[1].decode("ascii") if found else None
    # An element that can be read as ASCII is in no UTF-16, whatever it says.
    return None if charset is None or charset.lower().startswith(("utf-16", "utf16")) else charset


def read_pdf(content: bytes, charset: str | None, text: Text, pages: int) -> None:
    """The text of each page, in the order of the file."""
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise RefusedError("it is encrypted, and opening it needs a password")
    for number, page in enumerate(reader.pages):
        if number == pages:
            raise RefusedError(f"it has more than {pages} pages")
        if words := page.extract_text().strip():
            text.add(words + "\n\n")


def read_json(content: bytes, charset: str | None, text: Text, pages: int) -> None:
    """A line for each value that holds no others: where it is, and what it is."""

    def refuse(constant: str) -> None:
        raise RefusedError(f"{constant} is not JSON")

    value = json.loads(decode(content, charset), parse_constant=refuse)
    for path, leaf in _leaves(value):
        shown = leaf if isinstance(leaf, str) else json.dumps(leaf)
        text.add(f"{path}: {shown}\n" if path else f"{shown}\n")


def read_csv(content: bytes, charset: str | None, text: Text, pages: int) -> None:
    """A line for each row: the names of the first row's columns, and the row's values."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(decode(content, charset), newline=""), strict=True)
    names = next(rows, [])
    for number, row in enumerate(rows, 2):
        if row and len(row) != len(names):
            raise RefusedError(f"row {number} has {len(row)} cells, and the first one has {len(names)}")
        for name, cell in zip(names, row, strict=False):
            if cell:
                text.add(f"{name}: {cell}. ")
        text.add("\n" if row else "")


READERS: dict[str, Callable[[bytes, str | None, Text, int], None]] = {
    "text/html": read_html,
    "application/xhtml+xml": read_html,
    "application/pdf": read_pdf,
    "application/json": read_json,
    "text/csv": read_csv,
}


def read(request: dict[str, Any], content: bytes) -> str:
    """The text of one document. Raises ``RefusedError``, and for a broken file whatever its library raises."""
    most = min(request["characters"], max(RATIO_FREE_CHARACTERS, int(request["ratio"] * len(content))))
    text = Text(most)
    READERS[request["kind"]](content, request["charset"], text, request["pages"])
    whole = str(text).replace("\0", "")  # JSON can write it, PDF can show it, and no database takes it
    if not whole.strip() and content.strip():
        raise RefusedError("there is no text in it")
    return whole


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        path, found = pending.pop()
        if isinstance(found, dict):
            prefix = f"{path}." if path else ""
            pending += [(prefix + key, inner) for key, inner in reversed(found.items())]
        elif isinstance(found, list):
            pending += [(f"{path}[{n}]", found[n]) for n in reversed(range(len(found)))]
        else:
            yield path, found


def _answer(request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        data = read(request, content).encode("utf-8")
        return {"size": len(data)}, data
    except RefusedError as error:
        reason = str(error)
    except MemoryError:
        reason = "reading it takes more memory than a document may have"
    except RecursionError:
        reason = "it is nested too deep"
    except Exception as error:  # a file can make a library raise anything
        said = " ".join(str(error).split())[:200].encode("utf-8", "replace").decode()
        reason = f"it is no valid {request['kind']}: {said or type(error).__name__}"
    return {"reason": reason}, b""


def main() -> None:
    """Serve requests until stdin ends."""
    memory = int(sys.argv[1])
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(kind, (most, most))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        request = json.loads(line)
        content = requests.read(request["size"])
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + GRACE_SECONDS)  # then SIGALRM ends the process
        header, data = _answer(request, content)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(header).encode() + b"\n" + data)
        answers.flush()


if __name__ == "__main__":
    main()
