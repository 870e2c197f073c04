"""Who runs next: which sequences hold a cache slot, and what each step of the network works on.

Requests wait in a bounded line and are served in turn, one sequence each, so that a batch of a thousand does not hold
up whoever comes after it. In each step some of the prompts that are not read yet advance by a chunk, and every sequence
whose prompt is read gains a token: a long prompt never stalls the others for longer than one chunk.

Plain bookkeeping without threads or tensors: the engine calls it, under its lock where two threads might.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .sampler import Sampler


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt and what has been generated after it."""

    prompt: list[int]
    limit: int
    """The most tokens to generate; prompt and limit fit the context together."""
    sampler: Sampler
    wants_logprobs: bool = False
    slot: int = -1
    """Its cache slot while it runs."""
    read: int = 0
    """How many prompt tokens are in the cache."""
    generated: int = 0
    last_token: int = -1
    is_cancelled: bool = False
    """Set from any thread; seen before the next step."""


@dataclass(frozen=True)
class Step:
    """The work of one step."""

    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    """Sequences that read on in their prompts, and how many tokens."""
    decode: list[Sequence] = field(default_factory=list)
    """Sequences whose last token is to be followed by another."""

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that gain a token in this step: those that finish their prompts, then those that decode."""
        finishing = [sequence for sequence, count in self.prefill if sequence.read + count == len(sequence.prompt)]
        return finishing + self.decode


class Scheduler:
    """The line of waiting requests and the set of running sequences."""

    def __init__(self, *, slots: int, queue_size: int, prefill_tokens: int) -> None:
        self.slots = slots
        self.queue_size = queue_size
        self.prefill_tokens = prefill_tokens
        self.running: list[Sequence] = []
        self._waiting: deque[deque[Sequence]] = deque()

    @property
    def is_full(self) -> bool:
        """Whether the line holds as many requests as it may, beside those that have a slot from the next step on."""
        return len(self._waiting) >= self.queue_size + self.slots - len(self.running)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self._waiting

    @property
    def waiting(self) -> int:
        """How many requests stand in line; one that has sequences left counts once."""
        return len(self._waiting)

    def add(self, request: Iterable[Sequence]) -> None:
        """Put the sequences of one request at the end of the line. Ask ``is_full`` first."""
        sequences = deque(request)
        if sequences:
            self._waiting.append(sequences)

    def admit(self, free: int, allocate: Callable[[], int]) -> None:
        """Give the ``free`` slots to those first in line."""
        while free and self._waiting:
            request = self._waiting.popleft()
            sequence = request.popleft()
            if request:
                self._waiting.append(request)
            sequence.slot = allocate()
            self.running.append(sequence)
            free -= 1

    def drop_cancelled(self) -> list[Sequence]:
        """Forget the cancelled sequences; return those that were running, whose slots the caller frees."""
        self.clear_line()
        dropped = [sequence for sequence in self.running if sequence.is_cancelled]
        if dropped:
            self.running = [sequence for sequence in self.running if not sequence.is_cancelled]
        return dropped

    def clear_line(self) -> None:
        """Forget the cancelled sequences that wait, so that their places can be taken."""
        kept = (deque(s for s in request if not s.is_cancelled) for request in self._waiting)
        self._waiting = deque(request for request in kept if request)

    def drop_waiting(self) -> list[Sequence]:
        """Empty the line; return who stood in it."""
        dropped = [sequence for request in self._waiting for sequence in request]
        self._waiting.clear()
        return dropped

    def finish(self, sequence: Sequence) -> None:
        """Forget a running sequence."""
        self.running.remove(sequence)

    def plan(self) -> Step:
        """The next step. As many prompts are read at a time as fit one chunk; those longer than that take turns.

        The chunk counts a batch as the network does: the rows, all as long as the longest.
        """
        prefill: list[tuple[Sequence, int]] = []
        longest = 0
        for sequence in self.running:
            count = min(len(sequence.prompt) - sequence.read, self.prefill_tokens)
            if count == 0:
                continue
            if prefill and (len(prefill) + 1) * max(longest, count) > self.prefill_tokens:
                break
            longest = max(longest, count)
            prefill.append((sequence, count))
        decode = sorted((s for s in self.running if s.read == len(s.prompt)), key=lambda s: s.slot)
        for sequence, count in prefill:
            if sequence.read + count < len(sequence.prompt):
                self.running.remove(sequence)
                self.running.append(sequence)
        # In the order of their slots, for the cache reads neighbours without a copy.
        return Step(sorted(prefill, key=lambda part: part[0].slot), decode)
