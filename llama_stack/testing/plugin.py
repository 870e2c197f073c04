"""The pytest plugin of the conformance kit. One line enables it, in ``conftest.py``::

    pytest_plugins = "llama_stack.testing.plugin"

It brings what the tests that ``conformance`` makes need, and fixtures for an author's own tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from .conformance.in_process import serving_target

if TYPE_CHECKING:
    from ..client.event_loop import EventLoopThread
    from .conformance import Subject


@pytest.fixture(scope="module")
def conformance_target(request: pytest.FixtureRequest) -> Iterator[tuple[EventLoopThread, Subject]]:
    """A server around the provider under test, for all checks of one module."""
    with serving_target(request.param) as running:
        yield running
