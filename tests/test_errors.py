"""Errors that travel: what a server described becomes the class that the provider raised."""

from __future__ import annotations

from llama_stack.errors import ModelNotFoundError, StackError


def test_a_known_code_becomes_its_class() -> None:
    """A client catches ``ModelNotFoundError`` whether the provider is here or behind a URL."""
    revived = StackError.revive("model_not_found", "model 'x' is not served here", status=404, param="model")
    assert isinstance(revived, ModelNotFoundError)
    assert (revived.status, revived.param, revived.detail) == (404, "model", "model 'x' is not served here")


def test_an_unknown_code_keeps_its_own_status_each_time() -> None:
    """A newer server may know more codes; whether to send again depends on the status that came with this one."""
    first, second = (StackError.revive("brand_new", "words", status=status) for status in (400, 503))
    assert [(e.code, e.status, e.retriable) for e in (first, second)] == [
        ("brand_new", 400, False),
        ("brand_new", 503, True),
    ]
