"""Ending a child process that asyncio started."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio.subprocess import Process

_CHUNK_BYTES = 65_536


async def end_child(child: Process) -> None:
    """Kill a child and wait until it is gone; nothing happens to one that has ended."""
    with suppress(ProcessLookupError):
        child.kill()
    if child.stdout is not None:
        while await child.stdout.read(_CHUNK_BYTES):  # asyncio calls no child ended whose output nobody has read
            pass
    await child.wait()
