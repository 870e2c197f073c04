"""How many cores this process may use: a thread more than that waits for a core while the others wait for it."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores of the process' affinity, or of its container's quota, if that is less; at least one.

    The quota is what ``docker run --cpus`` sets: ``cpu.max`` of cgroup v2, ``cpu.cfs_quota_us`` and
    ``cpu.cfs_period_us`` of v1, in microseconds of CPU time a period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota() -> float | None:
    """In cores; None where there is none, or it cannot be read."""
    try:
        if (_CGROUP / "cpu.max").exists():
            allowed, period = (_CGROUP / "cpu.max").read_text().split()
        else:
            allowed, period = ((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if allowed == "max" or int(allowed) <= 0 else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
