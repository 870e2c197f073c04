"""Where a job tells how far it is: ``progress.jsonl``, and whoever else listens."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from .plan import PROGRESS_FILE, Event

E = TypeVar("E", bound=Event)
Sink = Callable[[Event], None]


class Progress:
    """Appends events to the file of one job; that of another rank than the first does nothing."""

    def __init__(self, job: Path, *, is_first: bool = True) -> None:
        self.is_first = is_first
        self._file = None
        self.sinks: list[Sink] = []
        if is_first:
            path = job / PROGRESS_FILE
            _end_last_line(path)
            self._file = path.open("ab", buffering=0)

    def tell(self, kind: type[E], **values: Any) -> None:
        """Append an event of now; all but steps are on disk when this returns."""
        if self._file is None:
            return
        event = kind(time=datetime.now(UTC), **values)
        self._file.write(event.model_dump_json(exclude_none=True).encode() + b"\n")
        if event.event != "step":
            os.fsync(self._file.fileno())
        for sink in self.sinks:
            sink(event)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _end_last_line(path: Path) -> None:
    """What a crash cut off must not spoil the line after it."""
    try:
        with path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
    except FileNotFoundError:
        pass
