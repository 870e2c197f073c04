"""What the engine needs of whoever executes its steps: the network and the picking of tokens, in one call.

The engine keeps the books and knows no tensors; an executor owns weights, cache and device, and knows no requests. So a
step crosses from one to the other as plain numbers, and only the picked tokens come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .batch import Batch
from .sampler import Choice, SampledToken


class Executor(Protocol):
    """Executes steps. One thread at a time calls it."""

    @property
    def block_tokens(self) -> int:
        """How many tokens a block of the cache holds."""
        ...

    def execute(self, batch: Batch, choices: Sequence[Choice]) -> list[SampledToken | None]:
        """Store the new tokens' keys and values, and pick a token after each place of ``batch.sampled``.

        There is a choice for each of these. None stands for logits that are not finite. After an exception the cache
        holds anything: call ``reset``.
        """
        ...

    def reset(self) -> None:
        """Blank the cache."""
        ...

    def close(self) -> None:
        """Free weights and cache; nothing else may be called afterwards."""
        ...
