"""What every test shares, and the wall around all of them: no test reaches beyond this machine."""

from __future__ import annotations

import ipaddress
import signal
import sys
import threading
from typing import Any

import pytest

from tests.postgresql import postgresql_schema_url, postgresql_server, postgresql_url

pytest_plugins = "llama_stack.testing.plugin"

__all__ = ["anyio_backend", "postgresql_schema_url", "postgresql_server", "postgresql_url"]


def _refuse_the_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: the suite must pass with the network cut off, so a connection elsewhere fails everywhere."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
        if host != "localhost" and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            raise PermissionError(f"a test tried to reach {host}; tests stay on this machine")


sys.addaudithook(_refuse_the_network)

if threading.current_thread() is threading.main_thread():
    # A shell that starts us in the background has us ignore interrupts, our children too; some tests send them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    """The stack runs on asyncio alone."""
    return "asyncio"
