"""The command line as a user calls it, and what it did."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llama_stack.client.event_loop import EventLoopThread
from llama_stack.testing.stub_inference import StubInference


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@contextmanager
def process(*arguments: str, site: Path | None = None, home: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own; ``site`` is a folder of packages beside the installed ones."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(site)] * (site is not None) + [str(Path.cwd())])
    if home is not None:
        environment["LLAMA_STACK_HOME"] = str(home)
    command = [sys.executable, "-c", "from llama_stack.cli import main; main()", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True, env=environment
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def ran_process(*arguments: str, site: Path | None = None) -> Ran:
    """What the command line did in a process of its own."""
    with process(*arguments, site=site) as started:
        out, err = started.communicate(timeout=60)
    return Ran(started.returncode, out, err)


@dataclass(frozen=True)
class Served:
    """A server that runs, and the model behind it."""

    url: str
    stub: StubInference
    thread: EventLoopThread
    """The thread that the server runs in."""
