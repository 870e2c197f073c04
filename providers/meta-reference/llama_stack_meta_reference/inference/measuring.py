"""Which type of weights this CPU is fastest with, found by running it: names do not tell what a processor is good at.

Many have no instructions for bfloat16 and multiply it a hundred times slower than float32, and whether half as many
bytes are read sooner depends on the memory. So each type does a small part of a network's work once, in some hundredths
of a second, and the faster one is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native.matrix import PackedMatrix

_SIZE = 2048
"""Outputs and inputs of the matrix: one that no cache next to a core holds, as those of real networks."""
_CHUNK_ROWS = 64
_TRIES = 5
_CLEARLY = 0.5


@lru_cache
def fastest_type(half: str, whole: str, *, compiled: bool) -> tuple[str, str]:
    """``half``, or ``whole`` if that takes less than half the time; and what was measured, in words for an operator.

    Half as many bytes are worth some time, and other work on the machine must not decide. Both are torch's types, by
    their names. ``compiled`` asks for the kernels of native/, which must be there, instead of torch's own product.
    """
    seconds = measure({name: _work(name, compiled) for name in (half, whole)})
    found = whole if seconds[whole] < _CLEARLY * seconds[half] else half
    return found, ", ".join(f"{spent * 1e3:.2f} ms in {name}" for name, spent in seconds.items())


def measure(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The shortest time of each, in seconds; they take turns, so that other work on the machine falls on all."""
    shortest = dict.fromkeys(works, float("inf"))
    for work in works.values():
        work()
    for _ in range(_TRIES):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            shortest[name] = min(shortest[name], time.perf_counter() - began)
    return shortest


def _work(name: str, compiled: bool) -> Callable[[], object]:
    """A token and a chunk of a prompt through one matrix of the type."""
    weights_OI = torch.full((_SIZE, _SIZE), 0.5)
    one_NI, chunk_NI = torch.ones(1, _SIZE), torch.ones(_CHUNK_ROWS, _SIZE)
    product: Callable[[Tensor], Tensor]
    if compiled:
        product = PackedMatrix(name, [weights_OI]).product
    else:
        weights_OI, one_NI, chunk_NI = (x.to(getattr(torch, name)) for x in (weights_OI, one_NI, chunk_NI))

        def product(values_NI: Tensor) -> Tensor:
            return F.linear(values_NI, weights_OI)

    def work() -> None:
        with torch.inference_mode():
            product(one_NI)
            product(chunk_NI)

    return work
