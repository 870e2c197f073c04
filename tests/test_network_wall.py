"""The wall that keeps the suite on this machine."""

from __future__ import annotations

import socket

import pytest


def test_a_connection_beyond_this_machine_fails_at_once() -> None:
    """Without the wall a test that needs the network would pass here and fail for whoever has none."""
    with socket.socket() as probe, pytest.raises(PermissionError, match="tests stay on this machine"):
        probe.connect(("192.0.2.1", 80))


def test_a_connection_on_this_machine_passes() -> None:
    """Servers under test listen on the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
