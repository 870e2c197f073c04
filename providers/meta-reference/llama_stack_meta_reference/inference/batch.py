"""What one step of the network works on: what the scheduler plans and a runner runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Batch:
    """The work of one step, ragged: the new tokens of all sequences side by side."""

    tokens: list[int] = field(default_factory=list)
    """The N new tokens."""
    starts: list[int] = field(default_factory=list)
    """For each sequence, the position of its first new token."""
    counts: list[int] = field(default_factory=list)
    """For each sequence, how many new tokens it has; at least one."""
    tables: list[list[int]] = field(default_factory=list)
    """For each sequence, its cache blocks; they cover its new tokens and may be more."""
    sampled: list[int] = field(default_factory=list)
    """The places in ``tokens`` after which logits are wanted, ascending."""
    adapters: list[int] = field(default_factory=list)
    """For each sequence, the adapter that it runs through, 0 for none; may be empty where none has one."""
