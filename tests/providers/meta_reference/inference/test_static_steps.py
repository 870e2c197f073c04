"""Padded steps over buffers that stay give what ragged steps give, and the fast kernels are called as they want it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch._dynamo
from llama_stack_meta_reference.inference import runner as runner_module
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.kv_cache import BLOCK_TOKENS
from llama_stack_meta_reference.inference.paged_views import FLASH_BLOCK_TOKENS, flash_agrees, has_flash
from llama_stack_meta_reference.inference.runner import TorchRunner
from llama_stack_meta_reference.inference.static_steps import StaticSteps, row_sizes
from llama_stack_meta_reference.llama.model import Llama

from tests.providers.meta_reference.flash import flash_on_the_cpu
from tests.providers.meta_reference.small_llama import SMALL

CONTEXT = 600
"""Of a network that is asked beyond what it was made for: more than two of the large blocks."""
SEQUENCES = 5


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As on a GPU with FlashAttention."""
    monkeypatch.setattr(runner_module, "has_flash", lambda *_: True)
    with flash_on_the_cpu() as calls:
        yield calls


class Sequences:
    """Texts of several sequences that are run in random cuts, each in scattered blocks of its own."""

    def __init__(self, block_tokens: int, seed: int) -> None:
        self.draw = random.Random(seed)
        self.blocks = SEQUENCES * (-(-CONTEXT // block_tokens) + 1)
        order = self.draw.sample(range(self.blocks), self.blocks)
        self.tables = [order[row::SEQUENCES] for row in range(SEQUENCES)]
        self.texts = [
            [self.draw.randrange(SMALL.vocab_size) for _ in range(length)] for length in (CONTEXT, 300, 257, 40, 3)
        ]
        self.done = [0] * SEQUENCES

    def step(self, most: int, longest: int) -> tuple[Batch, list[tuple[int, int]]]:
        """A step of at most ``most`` tokens for some sequences; and whose token each sampled one is."""
        batch, sampled = Batch(), list[tuple[int, int]]()
        rows = [row for row in range(SEQUENCES) if self.done[row] < len(self.texts[row])]
        for row in self.draw.sample(rows, self.draw.randint(1, len(rows))):
            start = self.done[row]
            count = min(self.draw.choice((1, 1, 2, longest)), len(self.texts[row]) - start, most - len(batch.tokens))
            if not count:
                continue
            for at in range(start, start + count):
                if at == start + count - 1 or self.draw.random() < 0.3:
                    batch.sampled.append(len(batch.tokens) + at - start)
                    sampled.append((row, at))
            batch.tokens += self.texts[row][start : start + count]
            batch.starts.append(start)
            batch.counts.append(count)
            batch.tables.append(self.tables[row])
            self.done[row] += count
        return batch, sampled


def check(runner: TorchRunner, model: Llama, sequences: Sequences, *, most: int, longest: int) -> None:
    """Run everything, and compare each logit with one whole pass over its text."""
    with torch.inference_mode():
        whole = [model(torch.tensor([text]))[0] for text in sequences.texts]
    while any(done < len(text) for done, text in zip(sequences.done, sequences.texts, strict=True)):
        batch, sampled = sequences.step(most, longest)
        expected = torch.stack([whole[row][at] for row, at in sampled])
        torch.testing.assert_close(runner.run(batch), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("block_tokens", [4, BLOCK_TOKENS, FLASH_BLOCK_TOKENS])
def test_padded_steps_give_what_whole_passes_give(small_model: Llama, block_tokens: int) -> None:
    """The same work as in a CUDA graph, but for the graph: padding, guesses as rows of their own, any width."""
    sequences = Sequences(block_tokens, seed=block_tokens)
    runner = TorchRunner(
        small_model, blocks=sequences.blocks, block_tokens=block_tokens, static_rows=20, context=CONTEXT
    )
    assert runner._static is not None
    assert row_sizes(20)[-1] == 24
    check(runner, small_model, sequences, most=24, longest=17)


def test_large_and_small_steps_take_turns_over_one_cache(small_model: Llama) -> None:
    """Prompts go the ragged way and answers the other; both must mean the same blocks."""
    sequences = Sequences(BLOCK_TOKENS, seed=1)
    runner = TorchRunner(small_model, blocks=sequences.blocks, static_rows=2, context=CONTEXT)
    check(runner, small_model, sequences, most=200, longest=60)


@pytest.mark.parametrize("static_rows", [0, 2, 20])
def test_flash_attention_is_called_as_it_wants_to_be(small_model: Llama, flash: list[int], static_rows: int) -> None:
    """Ragged and padded, over blocks in place; the stand-in is as strict as the kernel and does what it documents."""
    sequences = Sequences(FLASH_BLOCK_TOKENS, seed=static_rows)
    runner = TorchRunner(
        small_model,
        blocks=sequences.blocks,
        block_tokens=FLASH_BLOCK_TOKENS,
        static_rows=static_rows,
        context=CONTEXT,
    )
    check(runner, small_model, sequences, most=24, longest=17)
    assert 1 in flash
    assert (max(flash) == 1) is (static_rows == 20)


def test_flash_attention_is_tried_out_before_it_is_used(caplog: pytest.LogCaptureFixture) -> None:
    """What a build of torch brings is not known by its name: it may have none, or one with a fault."""
    caplog.set_level(logging.INFO)
    cpu = torch.device("cpu")
    assert not flash_agrees(cpu, torch.bfloat16, 64)
    assert "FlashAttention is not used on cpu: Could not run 'aten::_flash_attention_forward'" in caplog.text
    with flash_on_the_cpu() as calls:
        assert flash_agrees(cpu, torch.bfloat16, 64)
        assert calls == [3, 1]
    with flash_on_the_cpu(unwritten_rows=1):
        assert not flash_agrees(cpu, torch.float16, 64)
    assert "its answers are off by nan" in caplog.text
    assert not has_flash(cpu, torch.bfloat16, 64), "without a GPU nobody asks"


def test_small_blocks_never_meet_flash_attention(small_model: Llama, flash: list[int]) -> None:
    """It refuses them, in the first step of a request."""
    sequences = Sequences(BLOCK_TOKENS, seed=2)
    check(TorchRunner(small_model, blocks=sequences.blocks), small_model, sequences, most=60, longest=20)
    assert flash == []


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_what_is_left_in_a_block_and_in_the_padding_reaches_nobody(small_model: Llama, poison: float) -> None:
    """A sequence that overflowed may have been there, or a padded row before this one."""
    runner = TorchRunner(small_model, blocks=3, static_rows=8, context=48)
    assert runner._keys is not None
    assert runner._values is not None
    runner._keys[:, :-1].fill_(poison)
    runner._values[:, :-1].fill_(poison)
    tokens = [5, 9, 70]
    logits_RV = runner.run(Batch([*tokens, 8], [0, 0], [3, 1], [[2, 0, 1], [1]], [2, 3]))
    with torch.inference_mode():
        expected = torch.stack([small_model(torch.tensor([text]))[0, -1] for text in (tokens, [8])])
    torch.testing.assert_close(logits_RV, expected, atol=1e-4, rtol=0)
    assert not runner._keys[:, -1].any(), "the block beyond all ends stays zero"


def test_logits_come_for_the_places_that_are_asked_for(small_model: Llama) -> None:
    """None, some or all of a step's."""
    runner = TorchRunner(small_model, blocks=3, static_rows=8, context=48)
    batch = Batch([5, 9, 70], [0], [3], [[2]], [0, 1, 2])
    whole = runner.run(batch).clone()
    for sampled in ([], [1], [0, 2]):
        batch.sampled = sampled
        torch.testing.assert_close(runner.run(batch), whole[sampled], atol=1e-5, rtol=0)


def test_which_steps_are_small(small_model: Llama) -> None:
    """Few rows, none with a long chunk of a prompt, whose keys would be read again for each of its tokens; no adapter:
    what it adds would be captured with the rest."""
    runner = TorchRunner(small_model, blocks=3, static_rows=30, context=48)
    static = runner._static
    assert isinstance(static, StaticSteps)
    assert static.takes(Batch([1] * 32, [0] * 32, [1] * 32, [[0]] * 32))
    assert not static.takes(Batch([1] * 33, [0] * 33, [1] * 33, [[0]] * 33))
    assert static.takes(Batch([1] * 17, [0], [17], [[0, 1]]))
    assert not static.takes(Batch([1] * 18, [0], [18], [[0, 1]]))
    assert not static.takes(Batch([1], [0], [1], [[0]], adapters=[1]))


def test_the_sizes_waste_at_most_half() -> None:
    """Each costs memory and time at the start; too few cost work in every step."""
    sizes = row_sizes(1024)
    assert sizes[0] == 1
    assert sizes[-1] == 1024
    assert all(larger <= 2 * smaller for smaller, larger in pairwise(sizes))
    assert all(2 * larger <= 3 * smaller for smaller, larger in pairwise(sizes) if smaller >= 8)


def test_a_padded_step_asks_nothing_back_from_its_device() -> None:
    """A graph cannot: what depends on numbers must happen where they are. The meta device has no answers to give."""
    runner = TorchRunner(
        Llama(SMALL, device="meta", dtype=torch.bfloat16), blocks=9, block_tokens=4, static_rows=8, context=12
    )
    batch = Batch([1, 2, 3], [4, 0], [1, 2], [[0, 1], [2]], [0, 2])
    assert runner.run(batch).shape == (2, SMALL.vocab_size)


def test_all_layers_share_what_is_compiled(small_model: Llama) -> None:
    """A graph a layer and size would take minutes at the start; and the answers are the same. The compiler that makes
    no code shows how often one would be called; inductor was tried by hand."""
    plain, compiled = (
        TorchRunner(small_model, blocks=16, static_rows=12, context=48, compiler=compiler)
        for compiler in (None, "eager")
    )
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for rows in (12, 8, 4, 2, 1, 6):
        batch = Batch([9] * rows, [0] * rows, [1] * rows, [[row] for row in range(rows)], [*range(rows)])
        torch.testing.assert_close(compiled.run(batch), plain.run(batch), atol=1e-4, rtol=0)
    # Two functions, each for the first size, for any size and for a single row, which two layers and five sizes share.
    assert counters["stats"]["unique_graphs"] == 6
    assert not counters["graph_break"]


def test_a_padded_step_is_one_graph_to_torchs_compiler(small_model: Llama) -> None:
    """It finds any place at which the host would have to look at the device's numbers."""
    runner = TorchRunner(small_model, blocks=9, block_tokens=4, static_rows=8, context=12)
    static = runner._static
    assert static is not None
    batch = Batch([1, 2, 3], [4, 0], [1, 2], [[0, 1], [2]], [0, 1, 2])
    expected = runner.run(batch).clone()
    compute = torch.compile(static._compute, fullgraph=True, dynamic=False, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(small_model.logits(compute(4, 2)[:3]), expected, atol=1e-4, rtol=0)
