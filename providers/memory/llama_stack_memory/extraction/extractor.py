"""The text of a document, by its media type.

Plain text is decoded here. Everything else is read by ``reader.py`` in a child process with limits, for its parsers
are large and its input anybody's: what is too large, too slow or too much for a parser is an error of that one
document, and the next one gets a new process where the old one had to be killed.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import Message
from functools import lru_cache
from pathlib import Path

from llama_stack.children import end_child
from llama_stack.errors import UnreadableDocumentError

from ..config import DocumentLimits
from .reader import READERS, RefusedError, decode

TEXT_TYPES = ("text/plain", "text/markdown")
MEDIA_TYPES = (*TEXT_TYPES, *READERS)
"""What is read here."""
SMALL_BYTES = 65_536
"""A text of that size is decoded where it is; some charsets take a second for a large one."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Extractor:
    """Reads documents, one at a time. ``Extractor.started`` makes one and ends its process."""

    def __init__(self, limits: DocumentLimits) -> None:
        self._limits = limits
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    @staticmethod
    @asynccontextmanager
    async def started(limits: DocumentLimits) -> AsyncIterator[Extractor]:
        """An extractor for the length of the block; its process starts with the first document that needs it."""
        extractor = Extractor(limits)
        try:
            yield extractor
        finally:
            await extractor._end()

    async def extract(self, content: bytes, mime_type: str) -> str:
        """The text of a document.

        Raises ``UnreadableDocumentError`` for a type that is not read here, for bytes that are not of their type, and
        for a document that goes beyond a limit; the detail says which.
        """
        if _CONTROL.search(mime_type):
            raise UnreadableDocumentError(f"media type {mime_type!r} holds a control character")
        kind, charset = parse_mime_type(mime_type)
        if kind not in MEDIA_TYPES:
            known = ", ".join(MEDIA_TYPES)
            raise UnreadableDocumentError(f"media type {mime_type!r} is not read here; these are: {known}")
        if kind not in TEXT_TYPES:
            return await self._read(kind, charset, content)
        try:
            if len(content) <= SMALL_BYTES:
                text = decode(content, charset)
            else:
                text = await asyncio.to_thread(decode, content, charset)
        except RefusedError as error:
            raise UnreadableDocumentError(str(error)) from None
        if len(text) > self._limits.characters:
            raise UnreadableDocumentError(f"its text has more than {self._limits.characters} characters")
        return text

    async def _read(self, kind: str, charset: str | None, content: bytes) -> str:
        limits = self._limits
        request = {"kind": kind, "charset": charset, "size": len(content)} | limits.model_dump()
        async with self._turn:
            if self._process is None:
                self._process = await self._start()
            try:
                async with asyncio.timeout(limits.seconds):
                    message = json.dumps(request).encode() + b"\n" + content
                    text = await _exchange(self._process, message, most_bytes=4 * limits.characters)
            except BaseException as error:
                await self._end()  # it is in the middle of something
                if isinstance(error, TimeoutError):
                    raise UnreadableDocumentError(f"reading it takes more than {limits.seconds:g} s") from None
                if isinstance(error, EOFError | OSError | ValueError):
                    raise UnreadableDocumentError("reading it crashed the parser") from None
                raise
        if isinstance(text, RefusedError):
            raise UnreadableDocumentError(str(text))
        return text

    async def _start(self) -> asyncio.subprocess.Process:
        script = Path(__file__).with_name("reader.py")
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(script), str(self._limits.memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # a Ctrl-C in the terminal is for the server
        )

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await end_child(process)


@lru_cache(maxsize=256)
def parse_mime_type(mime_type: str) -> tuple[str, str | None]:
    """The media type in lower case, and its ``charset``."""
    message = Message()
    message["content-type"] = mime_type
    charset = message.get_param("charset")
    if isinstance(charset, tuple):  # 'charset*=...' of RFC 2231
        charset = charset[2]
    kind = mime_type.partition(";")[0].strip().lower()
    return kind, charset if isinstance(charset, str) else None


async def _exchange(process: asyncio.subprocess.Process, request: bytes, *, most_bytes: int) -> str | RefusedError:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request)
    await process.stdin.drain()
    header = json.loads(await process.stdout.readline() or b"null")
    if header is None:
        raise EOFError
    if "reason" in header:
        return RefusedError(header["reason"])
    if header["size"] > most_bytes:  # it does what no reader does
        raise EOFError
    return (await process.stdout.readexactly(header["size"])).decode("utf-8")
