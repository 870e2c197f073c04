"""What a job tells, as its trainer writes it to ``progress.jsonl``: read as it grows, summed up, and as lines of a log.

The server writes to the file too, while no trainer does: what it notes of a job's life stands among what the trainer
says of the training.
"""

from __future__ import annotations

import json
import os
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import JsonValue

from ..training.plan import (
    PROGRESS_FILE,
    Event,
    Failed,
    Finished,
    Note,
    Shown,
    Started,
    Step,
    Stopped,
    Trial,
    Validation,
    parse_event,
)

_READ_BYTES = 1 << 20
_RATE_STEPS = 16
"""Over how many of the last steps the rate is taken."""
MOST_LINES = 10_000
"""How many lines a snapshot of a log has; who follows a log gets all of them."""


class Reader:
    """The events of a job's file from its beginning, each once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS_FILE
        self._offset = 0

    def more(self) -> list[Event]:
        """What has been added since the last call, about a megabyte of it at most; what is half written waits.

        Nothing only where there is nothing more. Blocks on the disk. A line that a crash cut off, and one longer than
        any event, is passed over.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while read := file.read(_READ_BYTES):
                    whole = read[: read.rfind(b"\n") + 1]
                    if not whole and len(read) == _READ_BYTES:
                        whole = read  # in the middle of a line longer than any event
                    if not whole:
                        break
                    self._offset += len(whole)
                    file.seek(self._offset)
                    if events := [event for line in whole.split(b"\n") if (event := _event(line)) is not None]:
                        return events
        except FileNotFoundError:
            pass
        return []


def _event(line: bytes) -> Event | None:
    try:
        return parse_event(line)
    except ValueError:
        return None


def append(folder: Path, event: Event) -> None:
    """Write an event of the server's own behind what a trainer left, also where that was cut off in a line."""
    with (folder / PROGRESS_FILE).open("ab+") as file:
        _end_line(file)
        file.write(event.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def note(folder: Path, text: str) -> None:
    """Write a sentence for those who read the log."""
    append(folder, Note(time=datetime.now(UTC), text=text))


def _end_line(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


class Progress:
    """How far a job is."""

    def __init__(self, folder: Path) -> None:
        self._reader = Reader(folder)
        self._started: Started | None = None
        self._steps: deque[Step] = deque(maxlen=_RATE_STEPS)
        self._validation: Validation | None = None
        self._trial: Trial | None = None
        self.last: Event | None = None
        """What was told last."""

    def refresh(self) -> Progress:
        """Read on; blocks on the disk."""
        while events := self._reader.more():
            for event in events:
                self._take(event)
        return self

    def _take(self, event: Event) -> None:
        self.last = event
        if isinstance(event, Started):
            self._started = event
            self._steps.clear()
        elif isinstance(event, Step):
            self._steps.append(event)
        elif isinstance(event, Validation):
            self._validation = event
        elif isinstance(event, Trial):
            self._trial = event

    @property
    def iters(self) -> int:
        """How many iterations are done."""
        return self._steps[-1].iters if self._steps else self._started.iters if self._started else 0

    def resources(self) -> dict[str, JsonValue]:
        """What a job's status says of it: the device, how far it is, how fast, and how long it will take."""
        found: dict[str, JsonValue] = {}
        if started := self._started:
            found |= {
                "device": started.device,
                "processes": started.world_size,
                "precision": started.precision,
                "parameters": started.parameters,
                "trainable_parameters": started.trainable_parameters,
                "rows": started.rows,
                "iters": self.iters,
                "total_iters": started.total_iters,
            }
        if self._steps:
            step = self._steps[-1]
            found |= {
                "loss": step.loss,
                "learning_rate": step.learning_rate,
                "tokens_per_second": step.tokens_per_second,
                "seconds_left": step.seconds_left,
            }
            seconds = (step.time - self._steps[0].time).total_seconds()
            if seconds > 0:
                found["iters_per_second"] = round((step.iters - self._steps[0].iters) / seconds, 4)
            if step.accuracy is not None:
                found["accuracy"] = step.accuracy
        if self._validation is not None:
            found["validation_loss"] = self._validation.loss
        if self._trial is not None:
            found |= {"trial": self._trial.number, "trials": self._trial.trials}
        return found


def log_line(event: Event) -> str:
    """An event as one line: its time, its name, and ``name=value`` for the rest of it."""
    time = event.time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(event, Note):
        return f"{time} note {_one_line(event.text)}"
    if isinstance(event, Failed):
        return f"{time} failed {_one_line(event.reason)}"
    if isinstance(event, Shown):
        return f"{time} sample {json.dumps([list(piece) for piece in event.pieces], ensure_ascii=False)}"
    fields = event.model_dump(mode="json", exclude={"event", "time"}, exclude_none=True)
    return " ".join([time, event.event, *(f"{name}={_value(value)}" for name, value in fields.items())])


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ' "=\n') else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def is_last_word(event: Event | None) -> bool:
    """Whether a trainer that said this last has ended as it meant to."""
    return isinstance(event, Finished | Failed | Stopped)
