"""The checkpoint that ships: it is small, it loads, and it does what its card says."""

from __future__ import annotations

import pytest
import torch
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import Tokenizer, load_tokenizer
from llama_stack_meta_reference.tiny.__main__ import CHECKPOINT
from llama_stack_meta_reference.tiny.case import Skill
from llama_stack_meta_reference.tiny.evaluate import BARS, generate, measure

CASES = 20
MARGIN = 2
"""Cases that may fail beyond the bar: of 20, chance alone moves a share of 90 % by that much."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CHECKPOINT / "tokenizer.json")


@pytest.fixture(scope="module")
def model() -> Llama:
    return load_model(open_checkpoint(CHECKPOINT), device="cpu", dtype=torch.float32)


def test_the_folder_stays_under_12_mb() -> None:
    """It ships in the package, to everyone."""
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 12_000_000


def test_the_folder_states_what_ends_a_turn(tokenizer: Tokenizer) -> None:
    """An engine that did not know would run to the end of the context."""
    assert set(open_checkpoint(CHECKPOINT).eos_ids) == tokenizer.stop_ids


@pytest.mark.parametrize("skill", BARS)
def test_held_out_cases_meet_the_bar(model: Llama, tokenizer: Tokenizer, skill: Skill) -> None:
    """A small fixed sample of what the command measures, so that a broken prompt format or a lost weight shows."""
    score = measure(model, tokenizer, skill, CASES, seed=11)
    assert score.right >= BARS[skill] * CASES - MARGIN, [reply for _, reply in score.failures]


@pytest.mark.parametrize("skill", BARS)
def test_every_reply_ends(model: Llama, tokenizer: Tokenizer, skill: Skill) -> None:
    """On cases that the training was not tuned by: the measuring seed's were looked at while it was."""
    assert measure(model, tokenizer, skill, CASES, seed=11).ended == CASES


def test_replies_do_not_depend_on_what_else_is_in_the_batch(model: Llama, tokenizer: Tokenizer) -> None:
    """The measure answers many cases at a time; each must get the reply that it would get alone."""
    prompts = [tokenizer.encode(text) for text in ("Hello", "Who are you? I am", "One two three")]
    together = generate(model, tokenizer, prompts, longest=8)
    assert together == [generate(model, tokenizer, [prompt], longest=8)[0] for prompt in prompts]
