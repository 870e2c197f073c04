"""Files named by what they hold: kept whole or not at all, checked when read, and never named by a client."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llama_stack.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    StorageFullError,
    StoreFailedError,
    TooLargeError,
)
from llama_stack.storage.blobs import CHUNK_BYTES, Blobs
from llama_stack.storage.database import Health

pytestmark = pytest.mark.anyio

HOSTILE = [
    "",
    ".",
    "..",
    "../store.sqlite",
    "../" * 32 + "etc/passwd",
    "/etc/passwd",
    "a" * 63,
    "a" * 65,
    "A" * 64,
    "g" * 64,
    "a" * 64 + "\n",
    "a" * 63 + "\0",
    "a" * 31 + "/" + "a" * 32,
    "\uff41" * 64,
    "\u0661" * 64,
    "%2e%2e%2f" * 7 + "a",
]


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs" / "test", Health())


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_of(blobs_folder: Path, digest: str) -> Path:
    (found,) = blobs_folder.rglob(digest)
    return found


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "blobs" / "test" / "incoming").iterdir())


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
async def test_a_blob_comes_back_as_it_went_in(blobs: Blobs, tmp_path: Path, size: int) -> None:
    """Whole or in pieces, around the size of the pieces that it is read in."""
    data = os.urandom(size)
    digest = await blobs.put(data)
    assert digest == digest_of(data)
    assert await blobs.get(digest) == data
    assert b"".join([piece async for piece in blobs.open(digest)]) == data
    assert await blobs.contains(digest)
    assert leftovers(tmp_path) == []


async def test_a_stream_is_kept_like_bytes(blobs: Blobs) -> None:
    """An upload arrives in pieces of any size, empty ones too."""
    digest = await blobs.put(pieces(b"abc", b"", b"d" * (2 * CHUNK_BYTES), b"e"))
    assert digest == digest_of(b"abc" + b"d" * (2 * CHUNK_BYTES) + b"e")
    assert await blobs.put(pieces()) == digest_of(b"")
    assert await blobs.digests() == sorted([digest, digest_of(b"")])


async def test_the_same_bytes_put_by_many_at_once_are_one_blob(blobs: Blobs, tmp_path: Path) -> None:
    """Duplicates race in every ingestion."""
    digests = await asyncio.gather(*(blobs.put(b"same" * 1000) for _ in range(16)))
    assert await blobs.digests() == [digests[0]] == list(set(digests))
    assert leftovers(tmp_path) == []


async def test_a_blob_and_its_folders_are_private(blobs: Blobs, tmp_path: Path) -> None:
    """An attachment is as private as the conversation it came with."""
    before = os.umask(0)
    try:
        await blobs.put(b"private")
    finally:
        os.umask(before)
    for path in (tmp_path / "blobs").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("digest", HOSTILE)
async def test_what_is_no_digest_never_reaches_the_file_system(blobs: Blobs, digest: str) -> None:
    """A client's id that slips through is an unknown blob, not a path, in every method."""
    for attempt in (blobs.get(digest), blobs.contains(digest), blobs.delete(digest), anext(blobs.open(digest))):
        with pytest.raises(BlobNotFoundError):
            await attempt


async def test_an_unknown_digest_is_not_found(blobs: Blobs) -> None:
    """Before the folder exists, and after."""
    unknown = digest_of(b"unknown")
    for _ in range(2):
        assert not await blobs.contains(unknown)
        assert not await blobs.delete(unknown)
        with pytest.raises(BlobNotFoundError):
            await blobs.get(unknown)
        await blobs.put(b"known")


async def test_a_deleted_blob_is_gone_and_its_neighbour_stays(blobs: Blobs) -> None:
    """Deleting twice is not an error: a retried request does it."""
    first, second = await blobs.put(b"first"), await blobs.put(b"second")
    assert await blobs.delete(first)
    assert not await blobs.delete(first)
    assert await blobs.digests() == [second]
    assert await blobs.get(second) == b"second"


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty"])
async def test_a_damaged_blob_is_never_given_out_whole(blobs: Blobs, tmp_path: Path, damage: str) -> None:
    """A silent bit flip in a document would be an answer nobody can explain; putting it again repairs it."""
    data = os.urandom(2 * CHUNK_BYTES + 10)
    digest = await blobs.put(data)
    file = file_of(tmp_path, digest)
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    file.write_bytes({"flip": flipped, "cut": data[:-1], "grow": data + b"x", "empty": b""}[damage])
    with pytest.raises(BlobCorruptError):
        await blobs.get(digest)
    received = []

    async def receive() -> None:
        async for piece in blobs.open(digest):
            received.append(piece)

    with pytest.raises(BlobCorruptError):
        await receive()
    assert sum(map(len, received)) < len(data)
    assert await blobs.put(data) == digest
    assert await blobs.get(digest) == data


@pytest.mark.parametrize("kind", ["symbolic link", "fifo", "folder"])
async def test_what_is_not_a_plain_file_is_not_a_blob(blobs: Blobs, tmp_path: Path, kind: str) -> None:
    """A link would read another file, a pipe would wait for ever."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    digest = await blobs.put(b"secret")
    file = file_of(tmp_path / "blobs", digest)
    file.unlink()
    if kind == "symbolic link":
        file.symlink_to(secret)
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(BlobNotFoundError):
        await blobs.get(digest)


async def test_more_than_the_cap_is_refused_and_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    """A stream without an end must stop at the cap, not at the end of the disk."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 1000

    with pytest.raises(TooLargeError, match="5000"):
        await blobs.put(endless(), max_bytes=5000)
    assert taken == 6
    with pytest.raises(TooLargeError):
        await blobs.put(b"x" * 5001, max_bytes=5000)
    digest = await blobs.put(b"x" * 5000, max_bytes=5000)
    with pytest.raises(TooLargeError):
        await blobs.get(digest, max_bytes=4999)
    assert leftovers(tmp_path) == []
    assert await blobs.digests() == [digest]


async def test_a_stream_that_fails_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    """An upload that broke off is not a blob."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * (CHUNK_BYTES + 1)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await blobs.put(broken())
    assert leftovers(tmp_path) == []
    assert await blobs.digests() == []


async def test_cancelling_a_put_at_any_step_leaves_a_whole_blob_or_nothing(blobs: Blobs, tmp_path: Path) -> None:
    """The thread that writes must not outlive the descriptor it writes to."""
    open_before = len(os.listdir("/dev/fd"))
    for step in range(40):
        data = f"blob {step}".encode() * 1000
        task = asyncio.create_task(blobs.put(pieces(data)))
        for _ in range(step):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert leftovers(tmp_path) == [] if (tmp_path / "blobs" / "test" / "incoming").exists() else step < 5
    for digest in await blobs.digests():
        await blobs.get(digest)
    assert len(os.listdir("/dev/fd")) == open_before


async def test_a_reader_that_stops_early_closes_the_file(blobs: Blobs) -> None:
    """A client that hangs up in a download must not cost a descriptor."""
    digest = await blobs.put(os.urandom(3 * CHUNK_BYTES))
    open_before = len(os.listdir("/dev/fd"))
    reader = blobs.open(digest)
    await anext(reader)
    assert len(os.listdir("/dev/fd")) == open_before + 1
    await reader.aclose()
    assert len(os.listdir("/dev/fd")) == open_before


KILLED = """
import asyncio, os, sys
from pathlib import Path
from llama_stack.storage.blobs import Blobs
from llama_stack.storage.database import Health

async def never_ending():
    yield b"x" * 3_000_000
    os.write(1, b"half\\n")
    await asyncio.Event().wait()

asyncio.run(Blobs(Path(sys.argv[1]), Health()).put(never_ending()))
"""


async def test_a_sweep_removes_what_a_killed_process_left_and_nothing_that_is_being_written(
    blobs: Blobs, tmp_path: Path
) -> None:
    """A server that starts may not take away another one's upload."""
    folder = tmp_path / "blobs" / "test"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"half\n"
    assert await blobs.sweep() == 0
    assert len(leftovers(tmp_path)) == 1
    child.kill()
    child.wait()
    child.stdout.close()
    kept = await blobs.put(b"kept")
    assert len(leftovers(tmp_path)) == 1
    assert await blobs.sweep() == 1
    assert leftovers(tmp_path) == []
    assert await blobs.sweep() == 0
    assert await blobs.digests() == [kept]


async def test_a_sweep_between_making_and_locking_a_file_is_noticed(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one moment in which a new file looks abandoned."""
    real_flock = fcntl.flock
    swept: list[Path] = []

    def flock_after_a_sweep(file: int, operation: int) -> None:
        if not swept:
            for path in leftovers(tmp_path):
                path.unlink()
                swept.append(path)
        real_flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_a_sweep)
    digest = await blobs.put(b"kept all the same")
    assert len(swept) == 1
    assert await blobs.get(digest) == b"kept all the same"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_is_507_and_leaves_nothing(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The request may come again when there is room."""

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(StorageFullError):
            await blobs.put(b"too much")
    assert leftovers(tmp_path) == []
    assert await blobs.put(b"fits")


async def test_a_failed_sync_stops_the_whole_store(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows lie on the same disk: what it has lost, nobody knows."""

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(StoreFailedError):
            await blobs.put(b"lost")
    assert await blobs.digests() == []
    with pytest.raises(StoreFailedError, match="restarted"):
        await blobs.put(b"next")


async def test_a_blob_is_synced_before_its_name_and_the_name_before_it_is_acknowledged(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss may take either; in this order it never takes what was acknowledged."""
    await blobs.put(b"makes the folders")
    order = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        order.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real_fsync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    await blobs.put(b"makes the folders")
    assert order == ["sync file", "rename", "sync folder"]
