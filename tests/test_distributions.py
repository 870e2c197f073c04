"""The distributions that ship with the core: each starts, or is checked where it names what this machine has not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.inference import ChatCompletionRequest
from llama_stack.client import Client, whole
from llama_stack.distribution import check_distribution, shipped_distributions
from tests.started import started

SHIPPED = shipped_distributions()


def _variables(path: Path) -> set[str]:
    """The variables without which the file means nothing."""
    return set(re.findall(r"\$\{env\.([A-Z_]+)\}", path.read_text(encoding="utf-8")))


SELF_CONTAINED = sorted(name for name, path in SHIPPED.items() if not _variables(path))
DEPENDENT = sorted(SHIPPED.keys() - SELF_CONTAINED)


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_a_distribution_that_needs_nothing_starts_answers_and_ends(name: str, tmp_path: Path) -> None:
    """The first thing that a stranger types must work on a machine with no variable, no key and no network."""
    with started(name, tmp_path) as address, Client(address) as client:
        models = {model.model for model in client.models.list_models()}
        assert "llama3_8b_chat" in models
        request = ChatCompletionRequest(
            model="llama3_8b_chat", dialog=Dialog(message=Message.user("Who are you?")), max_tokens=40
        )
        assert whole(client.inference.chat_completion(request)).content


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_distribution_that_names_a_variable_says_so_and_is_right_otherwise(name: str) -> None:
    """What cannot start here is held to everything that can be said without starting it."""
    path = SHIPPED[name]
    faults = check_distribution(path, environ={})
    assert {variable for variable in _variables(path) for fault in faults if variable in str(fault)} == _variables(path)
    assert check_distribution(path, environ=dict.fromkeys(_variables(path), "/srv/checkpoint")) == []
