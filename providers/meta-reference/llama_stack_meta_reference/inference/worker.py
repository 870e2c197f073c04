"""A process that runs one model, or one rank of it, for the server that started it (workers.py).

    python -m llama_stack_meta_reference.inference.worker SOCKET

It answers the frames on its socket one after another, and ends when that is closed. What it has to say goes to the
server's log; only what a crash prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_stack.errors import StackError

from ..config import ModelConfig
from .drafting import GUESS
from .frames import Connection, Frame, FrameError, Kind, PeerGoneError, pack_picked, unpack_step

if TYPE_CHECKING:
    from .loading import OpenModel
    from .local_executor import LocalExecutor

logger = logging.getLogger("llama_stack.meta_reference.worker")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Worker:
    """Answers the server's frames."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rank = 0
        self._opened: OpenModel | None = None
        self._executor: LocalExecutor | None = None

    def serve(self) -> None:
        """Answer until the server is gone. Raises ``PeerGoneError`` then, and ``FrameError`` for what is no frame."""
        while True:
            frame = self._connection.receive()
            try:
                kind, body = self._answer(frame)
            except FrameError:
                raise
            except Exception as error:
                kind, body = Kind.FAILED, _failure(error)
            self._connection.send(kind, body)

    def _answer(self, frame: Frame) -> tuple[Kind, bytes]:
        if frame.kind is Kind.STEP and self._executor is not None:
            batch, choices = unpack_step(frame.body)
            if self._rank:  # the first rank picks for all
                self._executor.execute(batch, ())
                return Kind.DONE, b""
            guesses = [place for place, token in enumerate(batch.tokens) if token == GUESS]
            picked = self._executor.execute(batch, choices)
            return Kind.PICKED, pack_picked(picked, [batch.tokens[place] for place in guesses])
        if frame.kind is Kind.OPEN:
            return Kind.FACTS, self._open(frame.json())
        if frame.kind is Kind.LOAD and self._opened is not None:
            self._executor = self._opened.load(frame.json()["vocabulary"])
        elif frame.kind is Kind.RESET and self._executor is not None:
            self._executor.reset()
        elif frame.kind is Kind.ADD_ADAPTER and self._executor is not None:
            asked = frame.json()
            self._executor.add_adapter(asked["adapter"], asked["folder"])
        elif frame.kind is Kind.REMOVE_ADAPTER and self._executor is not None:
            self._executor.remove_adapter(frame.json()["adapter"])
        else:
            raise FrameError(f"{frame.kind.name} out of turn")
        return Kind.DONE, b""

    def _open(self, asked: dict[str, Any]) -> bytes:
        self._rank, ranks = asked["rank"], asked["ranks"]
        _log_to(self._connection, asked["log_level"] if self._rank == 0 else max(asked["log_level"], logging.WARNING))
        from ..llama.parallel import Rank
        from .loading import open_model  # torch takes seconds to import; signals and log are settled before

        rank = Rank(self._rank, ranks, Path(asked["rendezvous"])) if ranks > 1 else None
        config = ModelConfig.model_validate(asked["config"])
        self._opened = open_model(asked["name"], config, rank, asked["dtype"])
        return json.dumps(asdict(self._opened.facts)).encode()


class _ServerLog(logging.Handler):
    """Sends what is logged here to the server."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        line = {"logger": record.name, "level": record.levelno, "message": self.format(record)}
        with suppress(PeerGoneError):
            self._connection.send_json(Kind.LOG, line)


def main() -> None:
    """Serve the socket that is named on the command line."""
    # Ctrl-C and a supervisor's SIGTERM reach us too, and the server has requests to finish first.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the end of the socket is noticed after the step that runs
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    try:
        Worker(connection).serve()
    except PeerGoneError:
        code = 0
    except FrameError as error:
        logger.error("a worker ends: the server sent %s", error)
        code = 1
    os._exit(code)  # there is nothing to save, and a device or a peer may hang in what would come


def _log_to(connection: Connection, level: int) -> None:
    logging.basicConfig(handlers=[_ServerLog(connection)], level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("llama_stack").setLevel(level)
    logging.captureWarnings(True)


def _failure(error: Exception) -> bytes:
    """What to tell the server of an error; one that is not the stack's own is logged in full."""
    if isinstance(error, StackError):
        return json.dumps({"code": error.code, "detail": error.detail}).encode()
    logger.error("a worker could not do what it was asked to", exc_info=error)
    return json.dumps({"code": None, "detail": f"{type(error).__name__}: {error}"}).encode()


if __name__ == "__main__":
    main()
