"""Guessing the next tokens from what followed the same words before."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_stack_meta_reference.inference.drafting import NGRAMS, PromptLookup
from llama_stack_meta_reference.inference.kv_cache import BlockPool
from llama_stack_meta_reference.inference.sampler import Sampler
from llama_stack_meta_reference.inference.scheduler import Scheduler, Sequence

from llama_stack.apis.common import SamplingParams
from tests.providers.meta_reference.lookup import lookup_llama
from tests.providers.meta_reference.stepping import Stepper


def test_what_followed_the_same_words_is_proposed() -> None:
    """An answer that quotes its prompt goes on as the prompt does."""
    assert PromptLookup().propose([1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3], 3) == [4, 5, 6]


def test_the_latest_occurrence_counts() -> None:
    """What was said last is what is being repeated."""
    assert PromptLookup().propose([1, 2, 3, 4, 4, 1, 2, 3, 5, 5, 1, 2, 3], 2) == [5, 5]


def test_the_longest_repetition_counts_before_the_latest() -> None:
    """Text that is copied holds phrases that stand elsewhere too, and goes on as it does where it is copied from."""
    copied, elsewhere = [1, 2, 3, 4, 5, 6, 7, 8], [4, 5, 6, 0]
    assert PromptLookup().propose([*copied, *elsewhere, *copied[:6]], 2) == [7, 8]
    assert PromptLookup().propose([*copied, *elsewhere, 9, *copied[3:6]], 1) == [0]


def test_a_repetition_goes_on_past_the_end_of_the_text() -> None:
    """A list of equal lines, or of one token, would else be guessed a token at a time."""
    assert PromptLookup().propose([9, 1, 2, 1, 2, 1, 2], 4) == [1, 2, 1, 2]
    assert PromptLookup().propose([9, 5, 5, 5, 5], 4) == [5, 5, 5, 5]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [1, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_new_words_propose_nothing(tokens: list[int]) -> None:
    """Nor does a text that is too short to have said anything twice."""
    assert PromptLookup().propose(tokens, 8) == []


@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60), cuts=st.sets(st.integers(1, 60)))
def test_looking_as_the_text_grows_is_looking_at_all_of_it(tokens: list[int], cuts: set[int]) -> None:
    """The index is kept from step to step: an n-gram that it misses or that it places wrongly is a worse guess."""
    grown = PromptLookup()
    for cut in sorted(cuts):
        grown.propose(tokens[:cut], 4)
    found = grown.propose(tokens, 4)
    for length in NGRAMS:
        places = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        if places:
            break
    else:
        assert found == []
        return
    text = list(tokens)
    for step in range(4):
        text.append(text[places[-1] + step])
    assert found == text[len(tokens) :]


def test_a_long_prompt_is_indexed_within_a_few_steps() -> None:
    """All at once it would hold everyone up; what is indexed already serves meanwhile."""
    text = [*range(10_000), 5, 6, 7]
    lookup = PromptLookup()
    assert lookup.propose(text, 2) == [8, 9]
    text += [5000, 5001, 5002]
    assert [lookup.propose(text, 1) for _ in range(9)][4:] == [[5003]] * 5


def test_guesses_grow_while_they_are_right_and_pause_while_they_are_wrong() -> None:
    """A wrong guess costs time in a full step: where the text does not repeat, fewer than one step in 20 has one."""
    text = [1] * 9
    right = PromptLookup()
    sizes = []
    for _ in range(4):
        guess = right.propose(text, 16)
        sizes.append(len(guess))
        right.learn(len(guess), len(guess))
    assert sizes == [4, 8, 16, 16]
    right.learn(16, 5)
    assert len(right.propose(text, 16)) == 6
    assert len(PromptLookup(2).propose(text, 16)) == 2, "beside a draft network that may guess more"

    wrong, guesses = PromptLookup(), 0
    for _ in range(1000):
        guess = wrong.propose(text, 16)
        if guess:
            guesses += 1
            wrong.learn(len(guess), 0)
    assert guesses < 1000 / 20


def test_a_text_that_repeats_itself_takes_fewer_steps_and_is_the_same() -> None:
    """Eight guessed tokens and the one after them: at best a ninth of the steps."""
    model = lookup_llama({token: (token + 1) % 7 for token in range(7)}, 8)
    plain, quick = Stepper(model), Stepper(model, lookup_tokens=8)
    assert plain.generate([[0]], 100) == quick.generate([[0]], 100)
    assert (plain.steps, quick.steps) == (100, 20)
    assert quick.scheduler.metrics.accepted_tokens == quick.scheduler.metrics.drafted_tokens == 80


@pytest.mark.parametrize(("blocks", "count"), [(4, 4), (5, 5)])
def test_guesses_take_no_block_that_others_need(blocks: int, count: int) -> None:
    """A guess is a chance, another sequence's next token is not: there must be a block for everyone beside it."""
    scheduler = Scheduler(BlockPool(blocks, 8), max_sequences=2, queue_size=2, prefill_tokens=64, draft_tokens=8)
    guessed = Sequence([1] * 4, 40, Sampler(SamplingParams()), drafter=PromptLookup())
    scheduler.add([guessed])
    scheduler.add([Sequence([2], 40, Sampler(SamplingParams()))])
    for part in scheduler.plan().parts:
        scheduler.settle(part, [1] * part.sampled)
    assert [part.count for part in scheduler.plan().parts] == [count, 1]


@pytest.mark.parametrize("seed", range(3))
def test_text_without_repetitions_is_hardly_guessed_at(seed: int) -> None:
    """The setting is on for everyone, so whoever has no use for it must not pay for it."""
    draw, lookup = random.Random(seed), PromptLookup()
    text = [draw.randrange(1000) for _ in range(100)]
    drafted = 0
    for _ in range(400):
        text.append(draw.randrange(1000))
        guess = lookup.propose(text, 8)
        drafted += len(guess)
        if guess:
            lookup.learn(len(guess), 0)
    assert drafted <= 8
