"""A job in a terminal: a bar with rate and time left, and its losses as a plot, drawn from the lines of its log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

_BLOCKS = " ▁▂▃▄▅▆▇█"
_BAR = ("░", "█")
_LEFT = 10
"""Columns for the numbers beside the plot."""
_RATE_STEPS = 16


class Picture:
    """What the lines of a log have shown so far."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._total = 0
        self._losses: dict[int, float] = {}
        self._iters = 0
        self._recent: list[tuple[datetime, int]] = []
        self._seconds_left: float | None = None
        self._validation: float | None = None

    def take(self, line: str) -> str:
        """Read one line of the log; returns the name of its event."""
        time, _, rest = line.partition(" ")
        event, _, rest = rest.partition(" ")
        fields = dict(part.partition("=")[::2] for part in rest.split(" ")) if "=" in rest else {}
        if event == "started":
            self._total = int(_number(fields, "total_iters") or 0)
            self._iters = int(_number(fields, "iters") or 0)
            self._losses = {iters: loss for iters, loss in self._losses.items() if iters <= self._iters}
            self._recent = []
        elif event == "step" and (iters := _number(fields, "iters")) is not None:
            self._iters = int(iters)
            self._seconds_left = _number(fields, "seconds_left")
            if (loss := _number(fields, "loss")) is not None:
                self._losses[self._iters] = loss
            self._recent = [*self._recent[1 - _RATE_STEPS :], (datetime.fromisoformat(time), self._iters)]
        elif event == "validation":
            self._validation = _number(fields, "loss")
        return event

    @property
    def _rate(self) -> float | None:
        if len(self._recent) < 2:
            return None
        seconds = (self._recent[-1][0] - self._recent[0][0]).total_seconds()
        return (self._recent[-1][1] - self._recent[0][1]) / seconds if seconds > 0 else None

    def summary(self) -> str:
        """One line: how far, how fast, how long, and the losses."""
        parts = [f"{self._job}: {self._iters}/{self._total or '?'}"]
        if self._rate:
            parts.append(f"{self._rate:.3g} iterations/s")
        if self._seconds_left is not None:
            parts.append(f"{_duration(self._seconds_left)} left")
        if self._losses:
            parts.append(f"loss {self._losses[max(self._losses)]:.4g}")
        if self._validation is not None:
            parts.append(f"validation {self._validation:.4g}")
        return "  ".join(parts)

    def lines(self, *, columns: int, rows: int) -> list[str]:
        """The whole picture, in no more columns and rows than these."""
        columns = max(columns, 20)
        width = columns - 1
        done = int(width * self._iters / self._total) if self._total else 0
        drawn = [self.summary()[:width], _BAR[1] * done + _BAR[0] * (width - done)]
        height = rows - len(drawn)
        if len(self._losses) > 1 and height > 1:
            drawn += plot([self._losses[iters] for iters in sorted(self._losses)], width - _LEFT, height)
        return drawn


def plot(values: Sequence[float], columns: int, rows: int) -> list[str]:
    """Columns of blocks, each the mean of a stretch of the values, with the largest and the least value beside them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return []
    columns = min(columns, len(finite))
    edges = [round(index * len(finite) / columns) for index in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    steps = len(_BLOCKS) - 1
    # The least value is one step high: a column that is not seen would look like one that is not there.
    heights = [1 + round((mean - low) / ((high - low) or 1) * (rows * steps - 1)) for mean in means]
    drawn = []
    for row in range(rows - 1, -1, -1):
        label = f"{high:.4g}" if row == rows - 1 else f"{low:.4g}" if row == 0 else ""
        blocks = "".join(_BLOCKS[min(max(height - row * steps, 0), steps)] for height in heights)
        drawn.append(f"{label:>{_LEFT - 1}} {blocks}")
    return drawn


def _number(fields: dict[str, str], name: str) -> float | None:
    try:
        return float(fields[name])
    except (KeyError, ValueError):
        return None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
