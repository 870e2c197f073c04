"""Bytes too large for a row, in files named by the SHA-256 of what they hold.

A name comes from the contents alone, so nothing that a client sends ever becomes a path. Which blob belongs to what is
the business of the owner's tables.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ParamSpec, TypeVar

from llama_stack.errors import BlobCorruptError, BlobNotFoundError, StorageFullError, TooLargeError
from llama_stack.storage.cancellation import in_thread
from llama_stack.storage.files import make_private_folder, sync_folder

if TYPE_CHECKING:
    from llama_stack.storage.database import Health

P = ParamSpec("P")
T = TypeVar("T")

CHUNK_BYTES = 1024 * 1024
"""What is read, written and hashed in one go, off the event loop."""

MAX_BLOB_BYTES = 64 * 1024 * 1024
"""What ``put`` takes unless the caller allows more."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"[0-9a-f]{2}")


class Blobs:
    """The blobs of one owner.

    Put a blob before the row that names it is committed, and delete it after the last such row is gone. To be safe
    against another request that puts the same bytes, do both inside a ``Database.write`` block, which one owner runs
    one at a time.
    """

    def __init__(self, folder: Path, health: Health) -> None:
        self._folder = folder
        self._incoming = folder / "incoming"
        self._health = health

    async def put(self, data: bytes | AsyncIterable[bytes], *, max_bytes: int = MAX_BLOB_BYTES) -> str:
        """Keep ``data`` and return its SHA-256 as 64 hex digits; when this returns, the bytes are on the disk.

        Bytes that are there already are written again, which repairs a damaged copy. An exception or a cancellation,
        also one raised by ``data``, leaves nothing behind.

        Raises ``TooLargeError`` beyond ``max_bytes``, ``StorageFullError``, ``StoreFailedError``.
        """
        self._health.require_writable()
        if isinstance(data, bytes) and len(data) > max_bytes:
            raise _too_large(max_bytes)
        incoming = _Incoming(self._incoming)
        try:
            await self._on_disk(incoming.create)
            if isinstance(data, bytes):
                await self._on_disk(incoming.write, data)
            else:
                await self._receive(data, incoming, max_bytes)
            return await self._on_disk(incoming.keep, self._folder)
        finally:
            await in_thread(incoming.discard)

    async def get(self, digest: str, *, max_bytes: int = MAX_BLOB_BYTES) -> bytes:
        """The bytes of a blob, checked against its digest.

        Raises ``BlobNotFoundError``, ``BlobCorruptError``, and ``TooLargeError`` for one over ``max_bytes``.
        """
        chunks = []
        size = 0
        async for chunk in self.open(digest):
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
        return b"".join(chunks)

    async def open(self, digest: str) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a blob in pieces; the last comes only once the whole has been checked against the digest.

        Raises ``BlobNotFoundError`` before the first piece, ``BlobCorruptError`` before the last.
        """
        path = self._path(digest)
        with ExitStack() as stack:
            # Entered in the thread: a caller cancelled meanwhile still closes it.
            file = await in_thread(lambda: stack.enter_context(_open_regular(path)))
            hashed = hashlib.sha256()
            held = b""
            while chunk := await in_thread(_read, file, hashed):
                if held:
                    yield held
                held = chunk
            if hashed.hexdigest() != digest:
                raise BlobCorruptError(digest)
            if held:
                yield held

    async def contains(self, digest: str) -> bool:
        """Whether a blob of this digest is there; its bytes are not read."""
        return await in_thread(self._path(digest).is_file)

    async def delete(self, digest: str) -> bool:
        """Remove a blob, for good once this returns; false when there was none. Readers that have it open finish."""
        path = self._path(digest)

        def remove() -> bool:
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            sync_folder(path.parent)
            return True

        return await self._on_disk(remove)

    async def digests(self) -> list[str]:
        """The digest of every blob, sorted."""

        def scan() -> list[str]:
            folders = _names(self._folder, _FOLDER)
            return [name for folder in folders for name in _names(self._folder / folder, _DIGEST)]

        return await in_thread(scan)

    async def sweep(self) -> int:
        """Remove what a killed process left half-written, and return how many there were.

        What another process is writing at this moment is left alone. A provider calls this once, at its start.
        """

        def remove_abandoned() -> int:
            removed = 0
            for entry in sorted(self._incoming.iterdir()) if self._incoming.is_dir() else ():
                with suppress(FileNotFoundError), entry.open("rb") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    entry.unlink()
                    removed += 1
            return removed

        return await self._on_disk(remove_abandoned)

    def _path(self, digest: str) -> Path:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise BlobNotFoundError
        return self._folder / digest[:2] / digest

    async def _receive(self, data: AsyncIterable[bytes], incoming: _Incoming, max_bytes: int) -> None:
        size = 0
        pending: list[bytes] = []
        pending_bytes = 0
        async for piece in data:
            size += len(piece)
            pending_bytes += len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
            pending.append(piece)
            if pending_bytes >= CHUNK_BYTES:
                await self._on_disk(incoming.write, b"".join(pending))
                pending, pending_bytes = [], 0
        await self._on_disk(incoming.write, b"".join(pending))

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking ``work`` off the event loop and to its end; what the disk reports becomes an error of ours."""
        try:
            return await in_thread(work, *args, **kwargs)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError("the blob folder has no room left; nothing was kept") from error
            if error.errno == errno.EIO:
                raise self._health.fail(f"the disk under the blob folder failed ({error.strerror})") from error
            raise


class _Incoming:
    """A blob on its way in: a file under a name of its own, locked for as long as it is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._descriptor: int | None = None
        self._hashed = hashlib.sha256()

    def create(self) -> None:
        make_private_folder(self._folder)
        while True:
            path = self._folder / os.urandom(16).hex()
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            self._path = path
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if os.fstat(self._descriptor).st_nlink:
                return
            os.close(self._descriptor)  # a sweep came between making it and locking it

    def write(self, data: bytes) -> None:
        assert self._descriptor is not None
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._hashed.update(data)

    def keep(self, folder: Path) -> str:
        """Give the file its lasting name, durably, and return it."""
        assert self._descriptor is not None
        assert self._path is not None
        digest = self._hashed.hexdigest()
        os.fsync(self._descriptor)
        make_private_folder(folder / digest[:2])
        self._path.replace(folder / digest[:2] / digest)
        self._path = None
        sync_folder(folder / digest[:2])
        return digest

    def discard(self) -> None:
        """Remove the file unless it was kept."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)


def _open_regular(path: Path) -> BinaryIO:
    """The file at ``path``, which is neither a link nor a device. Raises ``BlobNotFoundError``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise BlobNotFoundError from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BlobNotFoundError
    return os.fdopen(descriptor, "rb", buffering=0)


def _read(file: BinaryIO, hashed: hashlib._Hash) -> bytes:
    chunk = file.read(CHUNK_BYTES)
    hashed.update(chunk)
    return chunk


def _names(folder: Path, form: re.Pattern[str]) -> list[str]:
    return sorted(name for name in os.listdir(folder) if form.fullmatch(name)) if folder.is_dir() else []


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the blob is larger than the {max_bytes} bytes allowed")
