"""The benchmark of memory banks runs, so that it does when somebody wants its figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "memory.py"


def test_the_benchmark_measures_what_is_installed() -> None:
    """On few rows; exact search misses nothing there either."""
    command = [sys.executable, str(BENCHMARK), "--rows", "1500", "--sides", "numpy,exact,insert,http"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {line.split()[0]: line for line in ran.stdout.splitlines()[2:6]}
    assert "left out" not in ran.stdout
    assert rows["numpy"].split()[3] == rows["exact"].split()[3] == "1.0000"
    assert {"insert", "http"} <= rows.keys()
