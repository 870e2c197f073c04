"""What the scheduler and the cache's books promise, whatever comes, in thousands of random histories.

``LLAMA_STACK_SIMULATIONS=10000`` runs so many of them instead of 500; ``make simulate`` does.
"""

from __future__ import annotations

import os
import random
from typing import cast

import pytest
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.draft_network import DraftNetwork
from llama_stack_meta_reference.inference.drafting import Drafter, NetworkGuesses, PromptLookup
from llama_stack_meta_reference.inference.kv_cache import BlockPool, blocks_for
from llama_stack_meta_reference.inference.runner import Runner
from llama_stack_meta_reference.inference.sampler import Sampler
from llama_stack_meta_reference.inference.scheduler import NOT_FINITE, End, Part, Scheduler, Sequence

from llama_stack.apis.common import SamplingParams
from tests.providers.meta_reference.simulated import STOP, VOCABULARY, SimulatedRunner, answer, drifting

SIMULATIONS = int(os.environ.get("LLAMA_STACK_SIMULATIONS", "500"))
GROUP = 50
ARRIVING_STEPS = 60
GREEDY = Sampler(SamplingParams())


@pytest.mark.parametrize("first", range(0, SIMULATIONS, GROUP))
def test_nothing_leaks_nobody_starves_and_everyone_is_answered_as_if_alone(first: int) -> None:
    """Arrivals, batches, cancellations, preemption, a full cache, failed steps and broken logits, in any order.

    A history that fails names its seed, and replays exactly.
    """
    seen = [0] * 6
    for seed in range(first, min(first + GROUP, SIMULATIONS)):
        history = History(seed)
        try:
            history.play()
        except BaseException as error:
            error.add_note(f"in the history of seed {seed}")
            raise
        happened = history.scheduler
        facts = (
            history.answered,
            history.faults,
            happened.metrics.reused_tokens,
            happened.metrics.preemptions,
            happened.metrics.accepted_tokens,
            history.guesses,
        )
        seen = [total + fact for total, fact in zip(seen, facts, strict=True)]
    if min(first + GROUP, SIMULATIONS) - first == GROUP:
        assert all(seen), (
            f"histories without answers, faults, reuse, preemption, right guesses or drafts prove little: {seen}"
        )


class History:
    """One random history of a scheduler and its cache."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        draw = self.draw
        size = draw.choice((1, 2, 4, 8))
        self.context = draw.randint(2, 60)
        blocks = blocks_for(self.context, size) * draw.choice((1, 1, 2, 3)) + draw.randint(0, 3)
        self.runner = SimulatedRunner(blocks=blocks, block_tokens=size)
        self.scheduler = Scheduler(
            BlockPool(blocks, size),
            max_sequences=draw.randint(1, 6),
            queue_size=draw.randint(1, 6),
            prefill_tokens=draw.choice((1, 3, 8, 20, 64)),
            draft_tokens=draw.choice((0, 1, 8)),
            prefix_reuse=draw.random() < 0.8,
        )
        self.draft_tokens = draw.choice((0, 0, 1, 4))
        drafting = SimulatedRunner(blocks=blocks, block_tokens=size, function=drifting)
        self.draft = DraftNetwork(cast(Runner, drafting), VOCABULARY) if self.draft_tokens else None
        texts = [[draw.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
        self.texts = texts
        self.prompts: dict[Sequence, int] = {}  # everyone under way, with the length of the prompt
        self.answered = self.faults = self.guesses = 0
        self.oldest: Sequence | None = None
        self.progress = (-1, -1)
        self.stalled = 0

    def play(self) -> None:
        """Let clients come for a while, then serve who is left."""
        for _ in range(ARRIVING_STEPS):
            self.arrive()
            self.cancel()
            self.step()
        # The oldest gains at least a token in as many steps as there may be sequences, and everyone becomes the oldest.
        patience = sum(one.limit + 1 for one in self.prompts) * (self.scheduler.max_sequences + 1)
        for _ in range(patience):
            if self.scheduler.is_idle:
                break
            self.step()
        assert self.scheduler.is_idle
        assert not self.prompts
        assert self.scheduler.pool.free == self.scheduler.pool.blocks

    def arrive(self) -> None:
        """Sometimes a request comes, of one prompt or several, some of which begin alike."""
        draw = self.draw
        if self.scheduler.is_full or draw.random() < 0.5:
            return
        request = []
        for _ in range(draw.choice((1, 1, 1, 5))):
            length = draw.randint(1, self.context - 1)
            common = draw.randint(0, length)
            prompt = draw.choice(self.texts)[:common] + [draw.randrange(VOCABULARY) for _ in range(length - common)]
            limit = length + draw.randint(1, self.context - length)
            drafter: Drafter = PromptLookup()
            if self.draft_tokens:
                drafter = NetworkGuesses(self.draft_tokens, draw.choice((drafter, None)))
            one = Sequence(list(prompt), limit, GREEDY, frozenset({STOP}), drafter=drafter)
            self.prompts[one] = length
            request.append(one)
        self.scheduler.add(request)

    def cancel(self) -> None:
        """Sometimes a client leaves, wherever it is."""
        if self.prompts and self.draw.random() < 0.15:
            leaving = self.draw.choice(list(self.prompts))
            leaving.is_cancelled = True
            self.scheduler.drop_cancelled()
            self.leave(leaving)

    def step(self) -> None:
        """One turn of the engine, with what must hold after each part of it."""
        scheduler, pool, draw = self.scheduler, self.scheduler.pool, self.draw
        step = scheduler.plan()
        assert bool(step.parts) == bool(scheduler.running)
        assert scheduler.running or not scheduler.waiting, "whoever waits can run alone at least"
        held = {block for one in scheduler.running for block in one.table}
        assert pool.free == pool.blocks - len(held)
        answering = sum(part.count - len(part.drafted) == 1 for part in step.parts)
        assert len(step.batch.tokens) <= max(
            scheduler.prefill_tokens, answering + max(scheduler.prefill_tokens // 4, 1)
        )
        self.check_progress()
        if not step.parts:
            return
        if draw.random() < 0.02:
            self.break_step(step.batch)
            return
        if self.draft:
            self.draft.run(step.batch)
        picked = self.runner.tokens(step.batch)
        step.take_guesses()
        self.guesses += sum(len(part.drafted) for part in step.parts if self.draft)
        row = 0
        for part in step.parts:
            one = part.sequence
            end = one.read + part.count
            assert self.runner.text(one.table, end) == bytes(one.tokens[: end - len(part.drafted)] + part.drafted)
            tokens, row = picked[row : row + part.sampled], row + part.sampled
            if tokens and draw.random() < 0.005:
                tokens[-1] = NOT_FINITE
            self.settle(part, tokens)
        assert row == len(picked)

    def settle(self, part: Part, tokens: list[int]) -> None:
        """Enter what came out, and see whether whoever ends has what it would have had alone."""
        one = part.sequence
        end = self.scheduler.settle(part, tokens)
        if end is None:
            return
        if end is End.NOT_FINITE:
            self.faults += 1
        else:
            assert one.tokens == answer(one.tokens[: self.prompts[one]], one.limit)
            self.answered += 1
        self.scheduler.finish(one)
        self.leave(one)

    def break_step(self, batch: Batch) -> None:
        """A step fails when it has written all it had to: the engine lets go of everyone in it and blanks the cache."""
        if self.draft:
            self.draft.run(batch)
        self.runner.fault = RuntimeError("broken")
        with pytest.raises(RuntimeError, match="broken"):
            self.runner.tokens(batch)
        for one in list(self.scheduler.running):
            self.scheduler.finish(one)
            self.leave(one)
        self.scheduler.pool.clear()
        self.runner.reset()
        if self.draft:
            self.draft.reset()
        self.faults += 1

    def leave(self, one: Sequence) -> None:
        """Whatever it has by now is how its answer alone begins."""
        length = self.prompts.pop(one)
        assert one.tokens == answer(one.tokens[:length], one.limit)[: len(one.tokens)]
        assert not one.table

    def check_progress(self) -> None:
        """The oldest is never set back, and gets on within as many steps as there may be sequences."""
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        if self.oldest in self.prompts:
            assert oldest is self.oldest, "the oldest had to give way"
        progress = (len(oldest.tokens), oldest.read) if oldest else (-1, -1)
        self.stalled = self.stalled + 1 if oldest is self.oldest and progress == self.progress else 0
        assert oldest is None or self.stalled <= self.scheduler.max_sequences + 1
        self.oldest, self.progress = oldest, progress
