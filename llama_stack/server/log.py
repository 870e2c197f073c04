"""The log: one JSON object a line on stderr, one line a request, with no content, query string or header in it."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Any

from .exchange import Exchange

MAX_WAITING_LINES = 10_000
"""Lines kept for a stderr that is not read; past it the oldest are dropped and counted."""

access = logging.getLogger("llama_stack.access")
errors = logging.getLogger("llama_stack.server")
_ENCODE = json.JSONEncoder(default=str, separators=(",", ":")).encode
_LOGGERS = ("llama_stack", "uvicorn", "asyncio", "py.warnings")


def log_exchange(exchange: Exchange, seconds: float) -> None:
    """Write the line of an exchange that is over."""
    if not access.isEnabledFor(logging.INFO):
        return
    record = logging.LogRecord(access.name, logging.INFO, __file__, 0, "request", None, None)
    record.fields = {
        "id": exchange.id,
        "method": exchange.known_method,
        "route": exchange.template,
        "status": exchange.status,
        "code": exchange.code,
        "duration_ms": round(seconds * 1000, 3),
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
    }
    access.handle(record)


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time, level, logger, message, what its ``fields`` add, and the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _ENCODE(line)


class LineWriter(logging.Handler):
    """Writes lines from a thread of its own, so that a slow stderr never holds up the event loop."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=MAX_WAITING_LINES)
        self._dropped = 0
        self._waiting = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)  # a log call with wrong arguments must not fail where it is made
            return
        if len(self._lines) == MAX_WAITING_LINES:
            self._dropped += 1
        self._lines.append(line)
        if not self._waiting.is_set():
            self._waiting.set()

    def close(self) -> None:
        """Write what is waiting, as far as stderr takes it within a second."""
        self._closing.set()
        self._waiting.set()
        self._thread.join(timeout=1)
        super().close()

    def _write(self) -> None:
        while not self._closing.is_set():
            self._waiting.wait()
            self._closing.wait(0.02)  # lines of busy moments go out in one write
            self._waiting.clear()
            self._flush_lines()
        self._flush_lines()  # what came during the last write

    def _flush_lines(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines.append(json.dumps({"level": "warning", "message": f"{dropped} log lines dropped: stderr is slow"}))
        try:
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()
        except (OSError, ValueError):
            self._dropped += len(lines)  # nobody reads stderr any more


@contextmanager
def logging_to_stderr(level: int = logging.INFO) -> Iterator[None]:
    """Send what the stack and the server log to stderr as JSON lines, for the length of a block."""
    handler = LineWriter(sys.stderr)
    found = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in found]
    logging.captureWarnings(True)
    for logger in found:
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("llama_stack").setLevel(level)
    try:
        yield
    finally:
        for logger, (handlers, old_level, propagate) in zip(found, before, strict=True):
            logger.handlers[:] = handlers
            logger.setLevel(old_level)
            logger.propagate = propagate
        logging.captureWarnings(False)
        handler.close()
