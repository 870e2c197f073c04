"""A real server with a scripted model, and the command line in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llama_stack.cli import main
from llama_stack.client.event_loop import EventLoopThread
from llama_stack.distribution import Distribution
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from llama_stack.testing.stub_inference import StubPlugin
from tests.cli.called import Ran, Run, Served


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
