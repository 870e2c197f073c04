"""What the engine needs of whoever executes its steps: the network and the picking of tokens, in one call.

The engine keeps the books and knows no tensors; an executor owns weights, cache and device, and knows no requests. So a
step crosses from one to the other as plain numbers, and only the picked tokens come back. ``local_executor`` executes
in this process, ``workers`` in processes of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from .batch import Batch
from .sampler import Choice, SampledToken


class ExecutorLostError(Exception):
    """What executes the steps has ended, hangs or talks nonsense; the text says how that was noticed."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are read: numbers and words that JSON carries."""

    layout: str
    """``meta`` or ``hugging_face``."""
    tokenizer: str
    """The tokenizer's file."""
    draft_tokenizer: str | None
    """That of the draft network, if there is one; it must hold the same tokens."""
    vocabulary: int
    """How many tokens the network knows; its tokenizer may know fewer."""
    eos_ids: tuple[int, ...]
    """Token ids that end a generation, as the folder states them."""
    parameters: int
    trained_context: int
    """The most tokens that the checkpoint was made for."""
    device: str
    dtype: str
    """How the weights are kept."""
    kernels: str
    """What runs the network: ``compiled`` or ``plain``."""
    context: int
    """The most tokens of one sequence, and all that follow: what the memory plan settled."""
    blocks: int
    block_tokens: int
    weight_bytes: int
    cache_bytes: int


class Executor(Protocol):
    """Executes steps. One thread at a time calls it, but for ``interrupt``."""

    @property
    def block_tokens(self) -> int:
        """How many tokens a block of the cache holds."""
        ...

    @property
    def restarts(self) -> int:
        """How often it was lost and came up again."""
        ...

    @property
    def lost_adapters(self) -> Collection[int]:
        """The adapters that a reset could not read again: what runs through one gets None for its tokens."""
        ...

    def execute(self, batch: Batch, choices: Sequence[Choice]) -> list[SampledToken | None]:
        """Store the new tokens' keys and values, and pick a token after each place of ``batch.sampled``.

        There is a choice for each of these. Where ``batch.tokens`` holds ``GUESS``, which only a model with a draft
        network is asked for, the token that was guessed is written in its place. None stands for logits that are not
        finite. After an exception, which is ``ExecutorLostError`` where there is nothing left that could execute, the
        cache holds anything: call ``reset``.
        """
        ...

    def check(self) -> None:
        """Raise ``ExecutorLostError`` when it was lost since the last call of anything. Never waits."""
        ...

    def add_adapter(self, adapter: int, folder: str) -> None:
        """Read the LoRA adapter in a folder; ``Batch.adapters`` calls it by this number, which is above 0 and new.

        Raises ``CheckpointError`` for a bad folder. A reset keeps it, or makes it one of ``lost_adapters``.
        """
        ...

    def remove_adapter(self, adapter: int) -> None:
        """Forget an adapter that no sequence runs through any more."""
        ...

    def reset(self) -> None:
        """Blank the cache; where the executor was lost, make one try to start it again, which may take long."""
        ...

    def interrupt(self) -> None:
        """End what is under way and whatever would follow, if that can be done; called from any thread."""
        ...

    def close(self) -> None:
        """Free weights and cache; nothing else may be called afterwards. May be called twice."""
        ...
