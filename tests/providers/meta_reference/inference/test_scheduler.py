"""Who runs next."""

from __future__ import annotations

import random
from itertools import count

import pytest
from llama_stack_meta_reference.inference.sampler import Sampler
from llama_stack_meta_reference.inference.scheduler import Scheduler, Sequence, Step

from llama_stack.apis.common import SamplingParams


def sequence(prompt_tokens: int) -> Sequence:
    return Sequence(prompt=[1] * prompt_tokens, limit=5, sampler=Sampler(SamplingParams()))


def scheduler(slots: int = 8, queue_size: int = 8, prefill_tokens: int = 16) -> Scheduler:
    return Scheduler(slots=slots, queue_size=queue_size, prefill_tokens=prefill_tokens)


def run(step: Step) -> dict[int, int]:
    """Do what the engine does with a step; return how far each prompt advanced, by length."""
    for reading, tokens in step.prefill:
        reading.read += tokens
    return {len(reading.prompt): tokens for reading, tokens in step.prefill}


def test_no_step_reads_more_than_a_chunk_and_short_prompts_pass_a_long_one() -> None:
    """Every running answer waits for the chunk, so its cost is bounded; and a long prompt must not hold up all others.

    Cost is what the network computes: rows times the longest.
    """
    subject = scheduler()
    long, five, four = sequence(100), sequence(5), sequence(4)
    for one in (long, five, four):
        subject.add([one])
    subject.admit(8, count().__next__)
    assert run(subject.plan()) == {100: 16}
    assert run(subject.plan()) == {5: 5, 4: 4}
    step = subject.plan()
    assert run(step) == {100: 16}
    assert step.decode == [five, four]
    while long.read < 100:
        assert run(subject.plan()) in ({100: 16}, {100: 4})
    assert subject.plan().decode == [long, five, four]


def test_two_long_prompts_take_turns() -> None:
    """Otherwise whoever comes second waits for all of the first one's prompt."""
    subject = scheduler()
    subject.add([sequence(40)])
    subject.add([sequence(41)])
    subject.admit(8, count().__next__)
    assert [run(subject.plan()) for _ in range(4)] == [{40: 16}, {41: 16}, {40: 16}, {41: 16}]


def test_only_a_finished_prompt_gains_a_token() -> None:
    """Sampling in the middle of a prompt would answer a question that was not asked to the end."""
    subject = scheduler()
    one = sequence(20)
    subject.add([one])
    subject.admit(8, count().__next__)
    first = subject.plan()
    assert first.sampled == []
    run(first)
    assert subject.plan().sampled == [one]


def test_a_batch_takes_turns_with_those_who_come_after_it() -> None:
    """A client's batch of thousands must not make the next client wait for all of it."""
    subject = scheduler(slots=1)
    batch = [sequence(1) for _ in range(4)]
    single = sequence(2)
    subject.add(batch)
    subject.add([single])
    served = []
    for _ in range(5):
        subject.admit(1, count().__next__)
        served.append(subject.running[0])
        subject.finish(subject.running[0])
    assert served == [batch[0], single, *batch[1:]]
    assert subject.is_idle


def test_the_line_is_bounded_beyond_the_free_slots_and_a_batch_is_one_place() -> None:
    """Memory and waiting time are bounded; yet no one is refused while there are slots to be had."""
    subject = scheduler(slots=2, queue_size=1)
    seen = []
    for _ in range(3):
        seen.append(subject.is_full)
        subject.add([sequence(1)])
    seen.append(subject.is_full)
    subject.admit(2, count().__next__)
    seen.append(subject.is_full)
    subject.finish(subject.running[0])
    seen.append(subject.is_full)
    subject.add([sequence(1) for _ in range(9)])
    seen.append(subject.is_full)
    assert seen == [False, False, False, True, True, False, True]
    assert subject.waiting == 2


def test_cancelled_sequences_leave_wherever_they_are() -> None:
    """Those that ran are returned, since their slots must be freed; those that waited just go."""
    subject = scheduler(slots=1)
    running, waiting, kept = sequence(1), sequence(1), sequence(1)
    subject.add([running])
    subject.admit(1, count().__next__)
    subject.add([waiting])
    subject.add([kept, sequence(1)])
    running.is_cancelled = waiting.is_cancelled = True
    assert subject.drop_cancelled() == [running]
    assert subject.waiting == 1
    subject.admit(1, count().__next__)
    assert subject.running == [kept]


@pytest.mark.parametrize("seed", range(100))
def test_no_slot_is_lost_shared_or_left_idle_whatever_happens(seed: int) -> None:
    """200 steps of random arrivals, batches, cancellations, ends and faults: any seed that fails replays exactly.

    After each event: running sequences hold distinct slots, free and held slots are all there are, and nobody waits
    while a slot is free. In the end everyone who was not cancelled has been served.
    """
    draw = random.Random(seed)
    slots = draw.randint(1, 5)
    subject = scheduler(slots=slots, queue_size=draw.randint(1, 6), prefill_tokens=draw.randint(1, 20))
    free = set(range(slots))
    alive: list[Sequence] = []
    served = 0

    def leave(sequence: Sequence) -> None:
        free.add(sequence.slot)
        alive.remove(sequence)

    for turn in range(10_000):
        is_closing = turn >= 200
        if is_closing and subject.is_idle:
            break
        if not is_closing and not subject.is_full and draw.random() < 0.5:
            arriving = [sequence(draw.randint(1, 60)) for _ in range(draw.choice((1, 1, 1, 7)))]
            subject.add(arriving)
            alive += arriving
        if not is_closing and alive and draw.random() < 0.3:
            draw.choice(alive).is_cancelled = True
        for dropped in subject.drop_cancelled():
            leave(dropped)
        alive = [one for one in alive if not one.is_cancelled]
        subject.admit(len(free), free.pop)
        held = [one.slot for one in subject.running]
        assert len(set(held)) == len(held)
        assert free.isdisjoint(held)
        assert len(free) + len(held) == slots
        assert not (free and subject.waiting)
        assert subject.waiting <= subject.queue_size + slots
        step = subject.plan()
        gaining = step.sampled
        assert bool(step.prefill or step.decode) == bool(subject.running)
        run(step)
        if draw.random() < 0.02:
            for broken in list(subject.running):
                subject.finish(broken)
                leave(broken)
        else:
            for one in gaining:
                one.generated += 1
                if one.generated == one.limit or draw.random() < 0.1:
                    served += 1
                    subject.finish(one)
                    leave(one)
    assert subject.is_idle
    assert not alive
    assert free == set(range(slots))
    assert served
