"""Who runs next: which sequences hold cache blocks, and what each step of the network works on.

Requests wait in a bounded line and are served in turn, one sequence each, so that a batch of a thousand does not hold
up whoever comes after it. A step has a budget of tokens: every sequence whose text is read gains a token, and chunks of
prompts fill what is left, so that a long prompt stalls the others for no longer than one chunk (Agrawal et al. 2023,
Sarathi, arXiv:2308.16369).

Running sequences are kept in the order of their admission. When the cache has no block left for one that needs it, the
youngest gives way: its blocks are freed and it goes to the head of the line, to be read again with what it has
generated so far. Nobody is admitted before the head of the line is, so the oldest always gets on, and everyone becomes
the oldest.

Plain bookkeeping without threads or tensors: the engine calls it, under its lock where two threads might.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from .batch import Batch
from .drafting import GUESS, Drafter
from .kv_cache import BlockPool, blocks_for
from .metrics import EngineMetrics
from .sampler import Sampler

NOT_FINITE = -1
"""Stands in place of a token where the logits were not finite."""
_DRAFTING = 4
"""All sequences together are drafted this many times what one may be: where many run, a step has little idle time."""


class End(Enum):
    """Why a sequence has ended."""

    STOP_TOKEN = auto()
    LIMIT = auto()
    """It has all the tokens that it may have."""
    NOT_FINITE = auto()
    """Its logits were not finite."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt and what has been generated after it."""

    tokens: list[int]
    """The prompt, then what was generated; grows."""
    limit: int
    """The most tokens that the prompt and the answer may have together; they fit the context."""
    sampler: Sampler
    stop_ids: frozenset[int] = frozenset()
    """The tokens that end it; such a token is no part of ``tokens``."""
    wants_logprobs: bool = False
    drafter: Drafter | None = None
    """Guesses its next tokens; for greedy samplers only."""
    adapter: int = 0
    """What it runs through besides the base model, 0 for nothing; cached blocks are shared with the same one only."""
    table: list[int] = field(default_factory=list)
    """Its cache blocks while it runs."""
    read: int = 0
    """How many of ``tokens`` are in the cache."""
    reused: int = 0
    """How many of them were there when it was admitted."""
    is_cancelled: bool = False
    """Set from any thread; seen before the next step."""
    submitted_at: float = 0.0
    """When it was, on the monotonic clock."""
    answered_at: float = 0.0
    """When it last gained a token; 0 before the first."""
    is_begun: bool = False
    """Whether it has been in a step."""
    indexed: int = 0
    """How many of its blocks others can find."""
    served: int = 0
    """The number of the step in which it last read a chunk."""

    @property
    def unread(self) -> int:
        """How many tokens are still to be run before the next one can be picked; 1 between two tokens."""
        return len(self.tokens) - self.read


@dataclass(slots=True)
class Part:
    """What one sequence does in a step."""

    sequence: Sequence
    count: int
    """How many tokens it runs, guessed ones included."""
    sampled: int
    """After how many of them, the last ones, a token is picked: 0 in the middle of a prompt."""
    drafted: list[int] = field(default_factory=list)
    """The guessed tokens among them, the last ones; ``GUESS`` until the step has been run."""
    first: int = 0
    """The place of its first token in the step's."""


@dataclass(slots=True)
class Step:
    """The work of one step."""

    parts: list[Part] = field(default_factory=list)
    batch: Batch = field(default_factory=Batch)

    def read(self, sequence: Sequence, count: int) -> None:
        """Let a sequence run its next ``count`` tokens."""
        end = sequence.read + count
        sampled = int(end == len(sequence.tokens))
        self._add(Part(sequence, count, sampled), sequence.tokens[sequence.read : end])

    def answer(self, sequence: Sequence, drafted: list[int]) -> None:
        """Let a sequence run its last token, and guessed ones after it."""
        count = 1 + len(drafted)
        self._add(Part(sequence, count, count, drafted), [sequence.tokens[-1], *drafted])

    def take_guesses(self) -> None:
        """Note what the draft network has guessed while the step was run."""
        for part in self.parts:
            if part.drafted and part.drafted[-1] == GUESS:
                part.drafted = self.batch.tokens[part.first + 1 : part.first + part.count]

    def _add(self, part: Part, tokens: list[int]) -> None:
        batch = self.batch
        part.first = len(batch.tokens)
        batch.tokens += tokens
        batch.starts.append(part.sequence.read)
        batch.counts.append(part.count)
        batch.tables.append(part.sequence.table)
        batch.adapters.append(part.sequence.adapter)
        batch.sampled += range(len(batch.tokens) - part.sampled, len(batch.tokens))
        self.parts.append(part)


class Scheduler:
    """The line of waiting requests and the set of running sequences."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        queue_size: int,
        prefill_tokens: int,
        draft_tokens: int = 0,
        prefix_reuse: bool = True,
    ) -> None:
        self.pool = pool
        self.max_sequences = max_sequences
        self.queue_size = queue_size
        self.prefill_tokens = prefill_tokens
        self.draft_tokens = draft_tokens
        self.prefix_reuse = prefix_reuse
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.metrics = EngineMetrics()
        """What happens here is counted here, the rest by the engine."""
        self._waiting: deque[deque[Sequence]] = deque()
        self._steps = 0
        self._too_few = -1  # so many free blocks were too few for the head of the line

    @property
    def is_full(self) -> bool:
        """Whether the line holds as many requests as it may, beside those that have a place from the next step on."""
        return len(self._waiting) >= self.queue_size + self.max_sequences - len(self.running)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self._waiting

    @property
    def waiting(self) -> int:
        """How many requests stand in line; one that has sequences left counts once."""
        return len(self._waiting)

    def add(self, request: Iterable[Sequence]) -> None:
        """Put the sequences of one request at the end of the line. Ask ``is_full`` first.

        The pool must be able to hold each of them alone, up to its limit.
        """
        sequences = deque(request)
        if sequences:
            self._waiting.append(sequences)

    def drop_cancelled(self) -> None:
        """Forget the cancelled sequences and free their blocks."""
        self.clear_line()
        for sequence in [sequence for sequence in self.running if sequence.is_cancelled]:
            self.finish(sequence)

    def clear_line(self) -> None:
        """Forget the cancelled sequences that wait, so that their places can be taken."""
        kept = (deque(s for s in request if not s.is_cancelled) for request in self._waiting)
        self._waiting = deque(request for request in kept if request)
        self._too_few = -1

    def drop_waiting(self) -> list[Sequence]:
        """Empty the line; return who stood in it."""
        dropped = [sequence for request in self._waiting for sequence in request]
        self._waiting.clear()
        self._too_few = -1
        return dropped

    def finish(self, sequence: Sequence) -> None:
        """Forget a running sequence and free its blocks."""
        self.running.remove(sequence)
        self.pool.release(sequence.table)

    def plan(self) -> Step:
        """The next step: a token for everyone whose text is read, and chunks of prompts.

        Prompts have what the others leave of the budget, and a quarter of it in any case. Those begun take turns; while
        others could begin, they leave half to them. Where no prompt is to be read, next tokens are guessed. The caller
        runs the step and passes each part to ``settle``.
        """
        self._steps += 1
        step = Step()
        self._extend_tables()
        answering = [sequence for sequence in self.running if sequence.unread == 1]
        begun = [sequence for sequence in self.running if sequence.unread > 1]
        newcomer = self._admit()
        # A step that reads prompts has no idle time in which a guess would cost nothing.
        guesses = 0 if begun or newcomer else self._guesses(len(answering))
        for sequence in answering:
            step.answer(sequence, self._draft(sequence, guesses) if guesses else [])
        left = max(self.prefill_tokens - len(answering), self.prefill_tokens // 4, 1)
        kept = left // 2 if newcomer else 0
        begun.sort(key=lambda sequence: sequence.served)
        for sequence in begun:
            if left == kept:
                break
            left -= self._read_on(step, sequence, left - kept)
        while newcomer and left:
            left -= self._read_on(step, newcomer, left)
            newcomer = self._admit() if left else None
        return step

    def settle(self, part: Part, picked: list[int]) -> End | None:
        """Enter what a step that has been run did for one part, with the ``sampled`` tokens that were picked after it.

        Returns why the sequence has ended, or None; whoever has ended is to be passed to ``finish``.
        """
        sequence, drafted = part.sequence, part.drafted
        end, accepted = None, 0
        for accepted, token in enumerate(picked):
            if token == NOT_FINITE:
                # What it read may be broken already, and must reach nobody through the index.
                self.pool.forget(sequence.table)
                return End.NOT_FINITE
            if token in sequence.stop_ids:
                end = End.STOP_TOKEN
                break
            sequence.tokens.append(token)
            if len(sequence.tokens) == sequence.limit:
                end = End.LIMIT
                break
            if accepted < len(drafted) and drafted[accepted] != token:
                break  # the tokens that follow continue another text; their places are written over
        sequence.read += part.count - len(drafted) + accepted
        if drafted:
            self.metrics.drafted_tokens += len(drafted)
            self.metrics.accepted_tokens += accepted
            assert sequence.drafter is not None
            sequence.drafter.learn(len(drafted), accepted)
        if self.prefix_reuse:
            full = sequence.read // self.pool.block_tokens
            while sequence.indexed < full:
                self.pool.index(sequence.table, sequence.indexed, sequence.tokens, sequence.adapter)
                sequence.indexed += 1
        return end

    def _read_on(self, step: Step, sequence: Sequence, most: int) -> int:
        count = min(sequence.unread, most)
        sequence.served = self._steps
        step.read(sequence, count)
        return count

    def _guesses(self, answering: int) -> int:
        """How many tokens may be guessed for each of ``answering`` sequences."""
        most = min(_DRAFTING * self.draft_tokens, self.prefill_tokens - answering)
        return min(self.draft_tokens, max(0, most) // max(1, answering))

    def _draft(self, sequence: Sequence, most: int) -> list[int]:
        """Guess up to ``most`` tokens, no more than may still come and than there are blocks to spare for."""
        if sequence.drafter is None:
            return []
        most = min(most, sequence.limit - len(sequence.tokens) - 1)
        drafted = sequence.drafter.propose(sequence.tokens, most) if most > 0 else []
        pool = self.pool
        room = len(sequence.table) * pool.block_tokens - len(sequence.tokens)
        if len(drafted) > room:
            missing = blocks_for(len(drafted) - room, pool.block_tokens)
            if pool.free - missing < len(self.running):
                return drafted[:room]
            sequence.table += pool.allocate(missing)
        return drafted

    def _extend_tables(self) -> None:
        """Give a block to each sequence whose next token has no place, the oldest first."""
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            place += 1
            if len(sequence.table) * self.pool.block_tokens > sequence.read:
                continue
            while not self.pool.free and self.running[-1] is not sequence:
                self._preempt(self.running[-1])
            if self.pool.free:
                sequence.table += self.pool.allocate(1)
            else:
                self._preempt(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.finish(sequence)
        sequence.read = 0
        self._waiting.appendleft(deque([sequence]))
        self._too_few = -1
        self.metrics.preemptions += 1

    def _admit(self) -> Sequence | None:
        """Admit the head of the line, if there is room for it: blocks for its text and one more for everyone."""
        pool, running = self.pool, self.running
        if not self._waiting or len(running) >= self.max_sequences or pool.free <= self._too_few:
            return None
        sequence = self._waiting[0][0]
        table = pool.match(sequence.tokens, sequence.adapter) if self.prefix_reuse else []
        missing = blocks_for(len(sequence.tokens), pool.block_tokens) - len(table)
        spare = pool.free - missing
        if spare < len(running):
            pool.release(table)
            self._too_few = pool.free
            return None
        self._too_few = -1
        request = self._waiting.popleft()
        request.popleft()
        if request:
            self._waiting.append(request)
        sequence.table = table + pool.allocate(missing)
        sequence.indexed = len(table)
        sequence.read = sequence.reused = len(table) * pool.block_tokens
        if not sequence.is_begun:  # whoever gave way finds what it had read itself
            self.metrics.reused_tokens += sequence.reused
        running.append(sequence)
        return sequence
