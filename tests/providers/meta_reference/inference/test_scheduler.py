"""Who runs next. What holds whatever happens is test_simulation.py's."""

from __future__ import annotations

from llama_stack_meta_reference.inference.kv_cache import BlockPool
from llama_stack_meta_reference.inference.sampler import Sampler
from llama_stack_meta_reference.inference.scheduler import NOT_FINITE, End, Scheduler, Sequence, Step

from llama_stack.apis.common import SamplingParams

GREEDY = Sampler(SamplingParams())
SIZE = 4


def sequence(prompt_tokens: int, answer: int = 100, text: int | None = None) -> Sequence:
    """Prompts of different lengths have nothing in common, unless told which ``text`` they are of."""
    start = prompt_tokens if text is None else text
    tokens = [1000 * start + index for index in range(prompt_tokens)]
    return Sequence(tokens=tokens, limit=prompt_tokens + answer, sampler=GREEDY, stop_ids=frozenset({2}))


def scheduler(
    *, blocks: int = 1000, max_sequences: int = 8, queue_size: int = 8, prefill_tokens: int = 16
) -> Scheduler:
    return Scheduler(
        BlockPool(blocks, SIZE), max_sequences=max_sequences, queue_size=queue_size, prefill_tokens=prefill_tokens
    )


def run(subject: Scheduler, step: Step, token: int = 1) -> dict[int, int]:
    """Do what the engine does with a step; return how many tokens each sequence ran, by its length before."""
    ran = {len(part.sequence.tokens): part.count for part in step.parts}
    for part in step.parts:
        if subject.settle(part, [token] * part.sampled) is not None:
            subject.finish(part.sequence)
    return ran


def test_a_step_is_one_ragged_batch_of_all_its_sequences() -> None:
    """What the runner gets: the tokens side by side, where each goes, and after which of them a logit is wanted."""
    subject = scheduler()
    first, second = sequence(5), sequence(20)
    subject.add([first])
    run(subject, subject.plan())
    subject.add([second])
    step = subject.plan()
    assert step.batch.tokens == [1, *second.tokens[:15]]
    assert (step.batch.starts, step.batch.counts, step.batch.sampled) == ([5, 0], [1, 15], [0])
    assert step.batch.tables == [first.table, second.table]
    assert [len(table) for table in step.batch.tables] == [2, 5]


def test_no_step_reads_more_than_a_chunk_and_short_prompts_pass_a_long_one() -> None:
    """Every running answer waits for the chunk, so its cost is bounded; and a long prompt must not hold up others."""
    subject = scheduler()
    long, five, four = sequence(100), sequence(5), sequence(4)
    subject.add([long])
    assert run(subject, subject.plan()) == {100: 16}
    subject.add([five])
    subject.add([four])
    assert run(subject, subject.plan()) == {100: 8, 5: 5, 4: 3}
    assert run(subject, subject.plan()) == {6: 1, 4: 1, 100: 14}
    while len(long.tokens) == 100:
        ran = run(subject, subject.plan())
        assert sum(ran.values()) <= 16
        assert len(ran) == 3


def test_two_long_prompts_take_turns() -> None:
    """Otherwise whoever comes second waits for all of the first one's prompt."""
    subject = scheduler()
    subject.add([sequence(70)])
    assert run(subject, subject.plan()) == {70: 16}
    subject.add([sequence(71)])
    assert run(subject, subject.plan()) == {70: 8, 71: 8}
    assert [run(subject, subject.plan()) for _ in range(4)] == [{70: 16}, {71: 16}, {70: 16}, {71: 16}]


def test_prompts_get_on_however_many_answers_run() -> None:
    """A step is full of running answers when there are as many as its budget; whoever comes must still get in."""
    subject = scheduler(prefill_tokens=4, max_sequences=9)
    subject.add([sequence(length) for length in range(1, 9)])
    while len(subject.running) < 8 or any(one.unread > 1 for one in subject.running):
        run(subject, subject.plan())
    subject.add([sequence(50)])
    step = subject.plan()
    assert [part.count for part in step.parts] == [1] * 9


def test_only_a_finished_prompt_gains_a_token() -> None:
    """Sampling in the middle of a prompt would answer a question that was not asked to the end."""
    subject = scheduler()
    subject.add([sequence(20)])
    for sampled in ([], [3], [0]):
        step = subject.plan()
        assert step.batch.sampled == sampled
        run(subject, step)


def test_a_batch_takes_turns_with_those_who_come_after_it() -> None:
    """A client's batch of thousands must not make the next client wait for all of it."""
    subject = scheduler(max_sequences=1)
    batch = [sequence(length, answer=1) for length in range(1, 5)]
    single = sequence(5, answer=1)
    subject.add(batch)
    subject.add([single])
    served = [subject.plan().parts[0].sequence]
    for _ in range(4):
        subject.finish(subject.running[0])
        served.append(subject.plan().parts[0].sequence)
    assert served == [batch[0], single, *batch[1:]]


def test_the_line_is_bounded_beyond_the_free_places_and_a_batch_is_one_place() -> None:
    """Memory and waiting time are bounded; yet no one is refused while there are places to be had."""
    subject = scheduler(max_sequences=2, queue_size=1)
    seen = []
    for _ in range(3):
        seen.append(subject.is_full)
        subject.add([sequence(1)])
    seen.append(subject.is_full)
    subject.plan()
    seen.append(subject.is_full)
    subject.finish(subject.running[0])
    seen.append(subject.is_full)
    subject.add([sequence(1) for _ in range(9)])
    seen.append(subject.is_full)
    assert seen == [False, False, False, True, True, False, True]
    assert subject.waiting == 2


def test_cancelled_sequences_leave_wherever_they_are() -> None:
    """Those that ran give their blocks back; those that waited just go."""
    subject = scheduler(max_sequences=1)
    running, waiting, kept = sequence(1), sequence(1), sequence(1)
    subject.add([running])
    subject.plan()
    subject.add([waiting])
    subject.add([kept, sequence(1)])
    running.is_cancelled = waiting.is_cancelled = True
    subject.drop_cancelled()
    assert subject.pool.free == subject.pool.blocks
    assert subject.waiting == 1
    subject.plan()
    assert subject.running == [kept]


def test_a_sequence_ends_at_its_limit_or_at_a_stop_token_that_is_no_part_of_it() -> None:
    """The two ways of an answer, and the third, which is an error."""
    subject = scheduler()
    limited, stopped, broken = sequence(3, answer=1), sequence(4), sequence(5)
    subject.add([limited, stopped, broken])
    parts = subject.plan().parts
    tokens = ([1], [2], [NOT_FINITE])
    ends = [subject.settle(part, token) for part, token in zip(parts, tokens, strict=True)]
    assert ends == [End.LIMIT, End.STOP_TOKEN, End.NOT_FINITE]
    assert [len(one.tokens) for one in (limited, stopped, broken)] == [4, 4, 5]


def test_a_prompt_that_begins_as_an_earlier_one_is_read_from_where_they_part() -> None:
    """System prompts and the history of a chat are most of what a server reads; answers are part of the history."""
    subject = scheduler(prefill_tokens=64)
    first = sequence(10)
    subject.add([first])
    for _ in range(7):
        run(subject, subject.plan())
    history = list(first.tokens)
    subject.finish(first)
    following = Sequence(tokens=[*history, 7, 7, 7], limit=50, sampler=GREEDY)
    subject.add([following])
    assert [part.count for part in subject.plan().parts] == [20 - 16]
    assert following.reused == 16


def test_the_second_of_a_batch_reads_only_what_the_first_has_not() -> None:
    """Batches often share a long prompt: with its first sequence read, the others begin at its end."""
    subject = scheduler(prefill_tokens=16)
    subject.add([sequence(16, text=1) for _ in range(4)])
    assert run(subject, subject.plan()) == {16: 16}
    step = subject.plan()
    assert [(part.sequence.reused, part.count) for part in step.parts] == [(0, 1), (12, 4), (12, 4), (12, 4)]


def test_without_reuse_everything_is_read() -> None:
    """The setting exists to compare, and for whoever must not let one client's timing tell of another's prompt."""
    subject = scheduler()
    subject.prefix_reuse = False
    for _ in range(2):
        one = sequence(12, answer=1)
        subject.add([one])
        assert run(subject, subject.plan()) == {12: 12}


def test_the_youngest_gives_way_and_goes_on_where_it_was() -> None:
    """A preemption costs time and nothing else: the text is kept, and nobody overtakes it."""
    subject = scheduler(blocks=4, prefill_tokens=64)
    old, young, last = sequence(4), sequence(3), sequence(1)
    subject.add([old])
    subject.add([young])
    run(subject, subject.plan())
    assert subject.running == [old, young]
    subject.add([last])
    while young in subject.running:
        run(subject, subject.plan())
    assert subject.metrics.preemptions == 1
    assert (young.table, young.read) == ([], 0)
    text = list(young.tokens)
    assert len(text) > 4
    subject.finish(old)
    step = subject.plan()
    assert subject.running == [young, last]
    assert step.parts[0].sequence is young
    assert young.tokens == text
    assert young.reused == 4


def test_nobody_is_admitted_before_the_head_of_the_line() -> None:
    """If small prompts might pass a large one whenever there is little room, the large one might wait for ever."""
    subject = scheduler(blocks=10, prefill_tokens=64)
    subject.add([sequence(24)])
    run(subject, subject.plan())
    large, small = sequence(17), sequence(1)
    subject.add([large])
    subject.add([small])
    run(subject, subject.plan())
    assert len(subject.running) == 1
    subject.finish(subject.running[0])
    subject.plan()
    assert subject.running == [large, small]


def test_what_a_broken_sequence_read_is_found_by_nobody() -> None:
    """Its keys may be broken too, and would break whoever begins alike, until they are evicted."""
    subject = scheduler()
    for _ in range(2):
        broken = sequence(20)
        subject.add([broken])
        assert [run(subject, subject.plan(), NOT_FINITE) for _ in range(2)] == [{20: 16}, {20: 4}]
    assert subject.pool.free == subject.pool.blocks
