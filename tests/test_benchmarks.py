"""Benchmarks that this machine cannot run in earnest run all the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_gpus_benchmark_runs_from_end_to_end_in_small() -> None:
    """Whoever has a GPU for an hour must not spend it on a typing error."""
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    ran = subprocess.run([*script, "--shape", "tiny", "--runs", "1", "--device", "cpu"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|", ran.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["float32", "float8", "int8"]
    assert all(float(rate) > 0 for _, rate in rows)
    assert re.search(r"24 streams of 48 in, 16 out, float32:\n  \d+ tokens/s while all decode", ran.stdout)
    assert re.search(r"first token after\n  \d+ ms in the median", ran.stdout)
