"""A distribution, started as an operator starts it: by name, in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

END_SECONDS = 60
"""A bound for a process that does not end, not a figure."""


@contextmanager
def started(name: str, home: Path) -> Iterator[str]:
    """Run the distribution with its state in ``home``; yields the address that it prints once it is ready.

    At the end of the block it is told to stop, and must leave with 0.
    """
    log = home / "server.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [str(Path(sys.executable).with_name("llama-stack")), "run", name, "--port", "0"],
            env=os.environ | {"LLAMA_STACK_HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
            address = next((match.group() for match in found if match), None)
            assert address is not None, f"it ended without an address:\n{log.read_text()}"
            yield address
            process.terminate()
            process.stdout.read()
            assert process.wait(END_SECONDS) == 0, log.read_text()
        finally:
            process.kill()
