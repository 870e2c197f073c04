"""Where a dataset's rows are: behind a URL, or in a blob of the stack's own.

``file://datasets/DIGEST.jsonl`` names such a blob. It is no path (a ``file:`` URL of a path has no host), so it shows a
client nothing of this machine and stays true when the state folder moves.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from llama_stack.errors import BlobNotFoundError, InvalidRequestError, StorageFullError, UnreadableDocumentError
from llama_stack.fetch import Fetcher
from llama_stack.storage import Blobs
from llama_stack.storage.cancellation import in_thread

from .rows import Form

SUFFIXES = {".jsonl": Form.JSONL, ".ndjson": Form.JSONL, ".csv": Form.CSV, ".parquet": Form.PARQUET}
MEDIA_TYPES = {
    "application/jsonl": Form.JSONL,
    "application/x-jsonl": Form.JSONL,
    "application/jsonlines": Form.JSONL,
    "application/json-lines": Form.JSONL,
    "application/x-ndjson": Form.JSONL,
    "application/ndjson": Form.JSONL,
    "text/csv": Form.CSV,
    "application/csv": Form.CSV,
    "application/vnd.apache.parquet": Form.PARQUET,
    "application/x-parquet": Form.PARQUET,
}
_STORED = re.compile(r"file://datasets/([0-9a-f]{64})\.jsonl")


def stored_url(digest: str) -> str:
    """The URL of rows that the stack keeps in a blob."""
    return f"file://datasets/{digest}.jsonl"


def stored_digest(url: str) -> str | None:
    """The digest of the blob that a URL names, or None where it names something else."""
    found = _STORED.fullmatch(url)
    return found[1] if found else None


def form_of(url: str, media_type: str | None) -> Form:
    """How rows are written down, by the URL's suffix, or else by what the source calls them.

    Raises ``UnreadableDocumentError`` for anything that is not read here.
    """
    path = "" if url.startswith("data:") else unquote(urlsplit(url).path)
    form = SUFFIXES.get(Path(path).suffix.lower()) or MEDIA_TYPES.get(media_type or "")
    if form is None:
        known = f"{', '.join(SUFFIXES)}, or served as {', '.join(sorted(MEDIA_TYPES))}"
        shown = repr(Path(path).name[-80:]) if path else "it"
        raise UnreadableDocumentError(
            f"the content cannot be read: neither the name {shown} nor the media type {media_type!r} says how; "
            f"files are read that are called {known}",
            param="dataset",
        )
    return form


class Content:
    """Opens what datasets describe."""

    def __init__(self, fetcher: Fetcher, blobs: Blobs, spool: Path | None) -> None:
        self._fetcher = fetcher
        self._blobs = blobs
        self._spool = spool

    @asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[tuple[IO[bytes], Form]]:
        """The content as a file, and how its rows are written down.

        Raises what ``Fetcher.open`` raises, and ``UnreadableDocumentError`` for content of a kind that is not read.
        """
        digest = stored_digest(url)
        if digest is not None:
            async with self._stored(digest) as file:
                yield file, Form.JSONL
            return
        async with self._fetcher.open(url, spool=self._spool) as opened:
            is_named = not url.startswith("data:") and Path(unquote(urlsplit(url).path)).suffix.lower() in SUFFIXES
            yield opened.file, form_of(url if is_named else opened.url, opened.media_type)

    @asynccontextmanager
    async def _stored(self, digest: str) -> AsyncIterator[IO[bytes]]:
        """The blob, checked against its digest as it is copied: a damaged one is not read half-way."""

        def write(piece: bytes) -> None:
            file.write(piece)
            file.flush()

        with ExitStack() as stack:
            file = await in_thread(lambda: stack.enter_context(tempfile.TemporaryFile(dir=self._spool)))
            try:
                async for piece in self._blobs.open(digest):
                    await in_thread(write, piece)
            except BlobNotFoundError:
                what = "the rows that content_url names are not kept here any more; store them again"
                raise InvalidRequestError(what, param="dataset") from None
            except OSError as error:
                raise StorageFullError("there is no room left for a copy of the rows") from error
            yield file
