"""The way out of a connection: joins what one turn of the event loop writes, and lingers when it closes early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

MAX_WAITING_BYTES = 65_536
"""Bytes held back within one turn; past it they go to the transport, which has the word on back-pressure."""


class Wire(asyncio.Transport):
    """A transport in front of the connection's own.

    What is written within one turn of the event loop goes out in one write, never later. ``close`` while the client is
    still sending first ends only our direction, so that the client can read the answer instead of a reset.
    """

    def __init__(
        self, transport: asyncio.Transport, is_receiving: Callable[[], bool], on_close: Callable[[], None]
    ) -> None:
        """``is_receiving`` tells whether the client is still sending; ``on_close`` is told that we close."""
        super().__init__()
        self.transport = transport
        self._loop = asyncio.get_running_loop()
        self._is_receiving = is_receiving
        self._on_close = on_close
        self._waiting: list[bytes | bytearray | memoryview] = []
        self._waiting_bytes = 0
        self._is_closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not data or self._is_closing:
            return
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes > MAX_WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand over what is held back."""
        if self._waiting:
            data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            if not self.transport.is_closing():
                self.transport.write(data)

    def close(self) -> None:
        if self._is_closing:
            return
        self.flush()
        self._is_closing = True
        if self._is_receiving() and self.transport.can_write_eof() and not self.transport.is_closing():
            try:
                self.transport.write_eof()
            except OSError:  # the client has reset the connection, and the loop has not heard of it yet
                self.transport.abort()
        else:
            self.transport.close()
        self._on_close()

    def is_closing(self) -> bool:
        return self._is_closing or self.transport.is_closing()

    def abort(self) -> None:
        self._is_closing = True
        self.transport.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.transport.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._waiting_bytes + self.transport.get_write_buffer_size()

    def pause_reading(self) -> None:
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        self.transport.resume_reading()

    def is_reading(self) -> bool:
        return self.transport.is_reading()
