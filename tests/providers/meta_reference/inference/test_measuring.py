"""Which type is fastest here is found by running it."""

from __future__ import annotations

import time

import pytest
from llama_stack_meta_reference.inference.measuring import fastest_type, measure

from tests.providers.meta_reference.kernels import NEEDS_KERNELS


def test_the_work_that_takes_longer_is_found() -> None:
    """The shortest of several tries: what else the machine does must not decide."""
    tries = iter([0.0, 0.2] + [0.0] * 10)
    found = measure({"slow": lambda: time.sleep(0.05), "quick": lambda: time.sleep(next(tries))})
    assert found["quick"] < found["slow"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_KERNELS)])
def test_one_of_the_types_is_named_with_the_times_of_both(compiled: bool) -> None:
    """An operator may ask why; and the answer is the same for the next model of this process."""
    fastest_type.cache_clear()
    found, words = fastest_type("float16", "float32", compiled=compiled)
    assert found in ("float16", "float32")
    assert "ms in float16" in words
    assert "ms in float32" in words
    assert fastest_type("float16", "float32", compiled=compiled) == (found, words)
