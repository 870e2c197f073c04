"""Streams read piece by piece off the wire: JSON lines, and server-sent events (WHATWG HTML section 9.2)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from ..errors import UpstreamError


class LineSplitter:
    """Cuts a byte stream into lines that end in LF, CR or CR LF. A line longer than ``max_bytes`` is refused."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._after_cr = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that this piece completes, without their ends. Raises ``UpstreamError`` for a huge line."""
        if not data:
            return
        ends_in_cr = data.endswith(b"\r")
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = ends_in_cr
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *complete, rest = data.split(b"\n")
        for line in complete:
            self._hold(line)
            yield self.rest()
        self._hold(rest)

    def rest(self) -> bytes:
        """What has come since the last line end; afterwards the splitter is empty."""
        line = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return line

    def _hold(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._max_bytes:
            raise UpstreamError(f"the server sent one item of more than {self._max_bytes} bytes")
        if part:
            self._parts.append(part)


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    kind: str
    data: bytes


async def lines(pieces: AsyncIterator[bytes], *, max_bytes: int) -> AsyncIterator[bytes]:
    """The lines of a body that are not empty; a last one without a line end counts."""
    splitter = LineSplitter(max_bytes)
    async for piece in pieces:
        for line in splitter.feed(piece):
            if line:
                yield line
    if line := splitter.rest():
        yield line


async def events(pieces: AsyncIterator[bytes], *, max_bytes: int) -> AsyncIterator[Event]:
    """The events of a body. One that the end of the body cuts off is dropped, as the standard asks."""
    splitter = LineSplitter(max_bytes)
    kind, data, size = "", list[bytes](), 0
    is_first = True
    async for piece in pieces:
        for line in splitter.feed(piece):
            if is_first:
                line, is_first = line.removeprefix(b"\xef\xbb\xbf"), False
            if not line:
                if data:
                    yield Event(kind or "message", b"\n".join(data))
                kind, data, size = "", [], 0
                continue
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"event":
                kind = value.decode("utf-8", "replace")
            elif field == b"data":
                size += len(value)
                if size > max_bytes:
                    raise UpstreamError(f"the server sent one item of more than {max_bytes} bytes")
                data.append(value)
