"""Training: what bears the loss, that it falls, and that it can be interrupted and shared."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from llama_stack_meta_reference.llama.chat_format import ChatFormat
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import Tokenizer, load_tokenizer
from llama_stack_meta_reference.tiny.__main__ import CHECKPOINT
from llama_stack_meta_reference.tiny.cases import training_cases
from llama_stack_meta_reference.tiny.samples import Encoder, batches, given_up, stumbled
from llama_stack_meta_reference.tiny.start import start
from llama_stack_meta_reference.tiny.train import CONFIG, Plan, Trainer, tokenizer_from_cases

from llama_stack.apis.common import Role

SMALL = replace(CONFIG, dim=64, n_layers=2, head_dim=16, ffn_dim=64)
QUICK = Plan(steps=8, batch_tokens=1024, warm_up_steps=2, drill_steps=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CHECKPOINT / "tokenizer.json")


def test_the_loss_is_on_the_assistants_words_alone(tokenizer: Tokenizer) -> None:
    """A model that learnt to write the user's part, or headers, would go on talking to itself."""
    encoder = Encoder(tokenizer)
    for case in islice(training_cases(4), 60):
        if not case.messages:
            continue
        sample = encoder.sample(case)
        learnt = [token for token, is_learnt in zip(sample.tokens, sample.learnt, strict=True) if is_learnt]
        replies = [message for message in case.messages if message.role == Role.ASSISTANT]
        chat = ChatFormat(tokenizer)
        assert learnt == [token for reply in replies for token in chat.encode_reply(reply)]


def test_a_sample_is_the_prompt_that_serving_makes_and_the_reply(tokenizer: Tokenizer) -> None:
    """The model must meet in training exactly the tokens that it will meet when it serves."""
    encoder = Encoder(tokenizer)
    for case in islice(training_cases(5), 60):
        if case.messages:
            assert list(encoder.sample(case).tokens) == encoder.prompt(case) + encoder.reply(case)


def test_a_batch_asks_for_the_token_after_each_place(tokenizer: Tokenizer) -> None:
    """Off by one, the model would learn to repeat its input."""
    for batch in batches(Encoder(tokenizer), 1, 0, tokens=2048, longest=256, phases={"drill": 1.0})[:5]:
        flat = batch.tokens_BT.flatten()
        assert torch.equal(flat[batch.places_N + 1], batch.targets_N)
        assert batch.tokens_BT.shape[1] <= 256


def test_a_few_steps_lower_the_loss(tokenizer: Tokenizer) -> None:
    """The loop learns at all: from near ln(2048) = 7.6 nats down by a good part of a nat."""
    losses = [loss for _, loss in Trainer(replace(QUICK, steps=25), Encoder(tokenizer), SMALL).run()]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5


def test_an_interrupted_training_ends_with_the_same_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Half an hour of work must survive a restart, and the result must not depend on it."""
    whole = Trainer(QUICK, Encoder(tokenizer), SMALL)
    for _ in whole.run():
        pass
    first = Trainer(QUICK, Encoder(tokenizer), SMALL)
    for step, _ in first.run():
        if step == 5:
            first.save(tmp_path / "state.pt")
            break
    second = Trainer(QUICK, Encoder(tokenizer), SMALL)
    second.load(tmp_path / "state.pt")
    assert [step for step, _ in second.run()] == [6, 7, 8]
    for name, weight in whole.average.state_dict().items():
        assert torch.equal(weight, second.average.state_dict()[name]), name


def test_the_start_can_copy_before_any_training() -> None:
    """The circuit is there: in random tokens that come twice, most of the second half is foretold by the first.

    Chance would be 1 in 2048; with this seed the share is far above one half.
    """
    model = Llama(CONFIG, device="cpu", dtype=torch.float32)
    start(model, 1)
    half = torch.randint(0, CONFIG.vocab_size, (4, 50), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([half, half], dim=1)
    with torch.no_grad():
        foretold = model(tokens)[:, 50:-1].argmax(-1)
    assert (foretold == tokens[:, 51:]).float().mean() > 0.5


def test_words_are_cut_the_same_way_wherever_they_stand() -> None:
    """Copying from a request into JSON is easy only while the tokens are the same."""
    tokenizer = tokenizer_from_cases(1, cases=400, vocabulary=900)
    ids = [tokenizer.encode(text, add_special_tokens=False).tokens for text in (" Zorblax", '"Zorblax', "_Zorblax")]
    assert ids[0][1:] == ids[1][1:] == ids[2][1:]
    assert ids[0][0] == "Ġ"
    assert tokenizer.to_str() == tokenizer_from_cases(1, cases=400, vocabulary=900).to_str()


def test_after_a_slip_the_model_learns_the_way_back_and_not_the_slip(tokenizer: Tokenizer) -> None:
    """Learnt repetitions would make it repeat itself; an unlearnt rest would leave it without an end."""
    encoder, draw = Encoder(tokenizer), random.Random(0)
    for case in islice(training_cases(6), 60):
        sample = encoder.sample(case)
        slipped = stumbled(sample, draw)
        added = len(slipped.tokens) - len(sample.tokens)
        assert 1 <= added <= 16
        # Take out the slip, wherever it is, and what remains is the sample; none of the slip is learnt.
        assert any(
            slipped.tokens[:place] + slipped.tokens[place + added :] == sample.tokens
            and slipped.learnt[:place] + slipped.learnt[place + added :] == sample.learnt
            and not any(slipped.learnt[place : place + added])
            for place in range(len(sample.tokens))
        )


def test_who_has_lost_the_way_learns_to_end_the_turn(tokenizer: Tokenizer) -> None:
    """What repeats itself is not learnt; the token after it, which is, is the one that ends the reply."""
    encoder, draw, unchanged = Encoder(tokenizer), random.Random(0), 0
    for case in islice(training_cases(7), 60):
        sample = encoder.sample(case)
        lost = given_up(sample, draw)
        if lost == sample:  # too short a reply to be repeated
            unchanged += 1
            continue
        end = len(lost.tokens) - 1
        assert (lost.tokens[end], lost.learnt[end]) == (sample.tokens[-1], True)
        begin = max(i for i in range(end) if lost.learnt[i]) + 1
        loop = lost.tokens[begin:end]
        lengths = [n for n in range(1, 9) if len(loop) >= 2 * n and loop == lost.tokens[begin - n : end - n]]
        assert lengths, "at least twice what stands before it"
        assert lost.tokens[:begin] == sample.tokens[:begin]
        assert lost.learnt[:begin] == sample.learnt[:begin]
    assert unchanged < 20
