"""A real server with a scripted model, and the command line as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_stack.cli import main
from llama_stack.client.event_loop import EventLoopThread
from llama_stack.distribution import Distribution
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from llama_stack.testing.stub_inference import StubInference, StubPlugin


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def call(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, out, err)

    return call


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


@pytest.fixture
def server() -> Iterator[Served]:
    """A server on a free port, with the models of the stub."""
    plugin = StubPlugin()
    distribution = Distribution.model_validate(
        {
            "version": 1,
            "name": "served",
            "providers": {"inference": [{"provider": "stub", "config": {"models": ["stub"]}}]},
            "server": {"port": 0, "drain_seconds": 1},
        }
    )
    stack = Stack(distribution, Registry(discover([plugin])))
    thread = EventLoopThread()
    started, listened = running(stack), listening(stack)
    try:
        thread.run(started.__aenter__())
        listener = thread.run(listened.__aenter__())
        yield Served(listener.url, plugin.started[0], thread)
        thread.run(listened.__aexit__(None, None, None))
        thread.run(started.__aexit__(None, None, None))
    finally:
        thread.close()
