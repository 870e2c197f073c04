"""The plain runner: ragged steps through paged memory give what whole passes give."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.kv_cache import blocks_for, cache_bytes
from llama_stack_meta_reference.inference.runner import TorchRunner
from llama_stack_meta_reference.llama.model import Llama
from torch import Tensor

from tests.providers.meta_reference.small_llama import SMALL

CONTEXT = 64
SIZE = 4


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def scattered(sequences: int, seed: int = 0) -> list[list[int]]:
    """Tables of whole contexts that share no block and are in no order."""
    width = blocks_for(CONTEXT, SIZE)
    blocks = random.Random(seed).sample(range(sequences * width), sequences * width)
    return [blocks[row * width : (row + 1) * width] for row in range(sequences)]


def new_runner(model: Llama, sequences: int = 4) -> TorchRunner:
    return TorchRunner(model, blocks=sequences * blocks_for(CONTEXT, SIZE), block_tokens=SIZE)


def run(runner: TorchRunner, tables: list[list[int]], parts: dict[int, tuple[int, Tensor]]) -> dict[int, Tensor]:
    """One step: for each sequence its start and new tokens in, the logits of all of them out."""
    counts = [len(tokens) for _, tokens in parts.values()]
    batch = Batch(
        tokens=[int(token) for _, tokens in parts.values() for token in tokens],
        starts=[start for start, _ in parts.values()],
        counts=counts,
        tables=[tables[row] for row in parts],
        sampled=list(range(sum(counts))),
    )
    return dict(zip(parts, torch.split(runner.run(batch), counts), strict=True))


@torch.inference_mode()
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, CONTEXT), min_size=2, max_size=4),
    cuts=st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=4, max_size=40),
    order=st.permutations(range(4)),
    arrivals=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_ragged_batches_in_any_cuts_equal_each_sequence_alone(
    small_model: Llama, lengths: list[int], cuts: list[int], order: list[int], arrivals: list[int]
) -> None:
    """Continuous batching mixes chunks of prompts with single steps: nobody may notice who else was in the batch."""
    runner, tables = new_runner(small_model), scattered(4)
    sequences = {order[seed]: random_tokens(length, seed) for seed, length in enumerate(lengths)}
    alone = {row: small_model(tokens[None])[0] for row, tokens in sequences.items()}
    done = dict.fromkeys(sequences, 0)
    step = 0
    while any(done[row] < len(tokens) for row, tokens in sequences.items()):
        parts = {}
        for row, tokens in sequences.items():
            if done[row] < len(tokens) and step >= arrivals[row]:
                parts[row] = (done[row], tokens[done[row] : done[row] + cuts[(step + row) % len(cuts)]])
        for row, logits_TV in (run(runner, tables, parts) if parts else {}).items():
            expected = alone[row][done[row] : done[row] + len(logits_TV)]
            torch.testing.assert_close(logits_TV, expected, atol=1e-4, rtol=0)
            done[row] += len(logits_TV)
        step += 1


@pytest.mark.parametrize("chunk", range(1, CONTEXT + 1))
def test_a_prompt_in_chunks_of_any_size_gives_the_logits_of_one_pass(small_model: Llama, chunk: int) -> None:
    """A wrong offset or mask shows at some size, most likely around that of a block."""
    runner, tables, tokens = new_runner(small_model, 1), scattered(1), random_tokens(CONTEXT, 3)
    parts = [run(runner, tables, {0: (start, part)})[0] for start, part in _cut(tokens, chunk)]
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(parts), small_model(tokens[None])[0], atol=1e-4, rtol=0)


def _cut(tokens: Tensor, chunk: int) -> list[tuple[int, Tensor]]:
    parts = torch.split(tokens, chunk)
    return list(zip(accumulate((len(part) for part in parts), initial=0), parts, strict=False))


def test_logits_come_for_the_places_that_are_asked_for(small_model: Llama) -> None:
    """The output layer is the largest of all: a prompt needs it at its last token only."""
    runner, tables, tokens = new_runner(small_model), scattered(2), random_tokens(20, 0)
    whole = run(runner, tables, {0: (0, tokens)})[0]
    batch = Batch(tokens=[*tokens.tolist(), *tokens.tolist()], starts=[0, 0], counts=[20, 20], tables=tables)
    assert runner.run(batch).shape == (0, SMALL.vocab_size)
    batch.sampled = [7, 39]
    torch.testing.assert_close(runner.run(batch), whole[[7, 19]], atol=1e-4, rtol=0)


def test_sequences_may_share_the_blocks_of_what_they_have_in_common(small_model: Llama) -> None:
    """Prefix reuse is this and nothing more: two tables with the same first blocks."""
    runner, (first, second) = new_runner(small_model), scattered(2)
    common, ends = random_tokens(3 * SIZE, 0), [random_tokens(9, 1), random_tokens(5, 2)]
    tables = [first, first[:3] + second[3:]]
    run(runner, tables, {0: (0, torch.cat([common, ends[0]]))})
    logits = run(runner, tables, {1: (3 * SIZE, ends[1]), 0: (3 * SIZE + 9, ends[1][:1])})
    for row, text in ((1, [common, ends[1]]), (0, [common, ends[0], ends[1][:1]])):
        with torch.inference_mode():
            expected = small_model(torch.cat(text)[None])[0, -len(logits[row]) :]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_what_is_left_in_a_block_reaches_nobody(small_model: Llama, poison: float) -> None:
    """Even of a sequence whose values overflowed: a mask multiplies by zero, and zero times infinity is no number."""
    runner, tables = new_runner(small_model, 2), scattered(2)
    assert runner._keys is not None
    assert runner._values is not None
    runner._keys[:, :-2].fill_(poison)
    runner._values[:, :-2].fill_(poison)
    short, long = random_tokens(4, 0), random_tokens(50, 1)
    run(runner, tables, {0: (0, short[:2]), 1: (0, long[:49])})
    logits = run(runner, tables, {0: (2, short[2:3]), 1: (49, long[49:])})
    logits |= {2: run(runner, tables, {0: (3, short[3:])})[0]}
    with torch.inference_mode():
        torch.testing.assert_close(logits[0], small_model(short[None])[0, 2:3], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[1], small_model(long[None])[0, 49:], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[2], small_model(short[None])[0, 3:], atol=1e-4, rtol=0)


def test_a_step_that_was_not_whole_can_be_run_again(small_model: Llama) -> None:
    """What a rejected draft or a broken step wrote is written over when its positions are run again."""
    runner, tables, tokens = new_runner(small_model), scattered(1), random_tokens(12, 0)
    run(runner, tables, {0: (0, tokens[:4])})
    run(runner, tables, {0: (4, random_tokens(8, 5))})
    logits = run(runner, tables, {0: (4, tokens[4:])})[0]
    with torch.inference_mode():
        torch.testing.assert_close(logits, small_model(tokens[None])[0, 4:], atol=1e-4, rtol=0)


def test_reset_blanks_the_cache_in_place(small_model: Llama) -> None:
    """A second cache may not fit beside the first."""
    runner = new_runner(small_model)
    run(runner, scattered(1), {0: (0, random_tokens(9, 0))})
    assert runner._keys is not None
    memory = runner._keys.data_ptr()
    runner.reset()
    assert not runner._keys.any()
    assert runner._keys.data_ptr() == memory


def test_a_step_asks_nothing_back_from_its_device() -> None:
    """A GPU that is asked in the middle of a step stands idle meanwhile; the meta device has no answers to give."""
    runner = new_runner(Llama(SMALL, device="meta", dtype=torch.bfloat16))
    tables = scattered(3)
    for starts, counts in (([0, 0, 8], [5, 3, 1]), ([4, 9, 7], [1, 1, 1]), ([3, 3, 3], [1, 2, 1]), ([5], [4])):
        total = sum(counts)
        batch = Batch([0] * total, starts, counts, tables[: len(counts)], [total - 1])
        assert runner.run(batch).shape == (1, SMALL.vocab_size)


def test_the_cache_takes_the_bytes_that_are_planned(small_model: Llama) -> None:
    """All at once, and two blocks more: one for what pads a step, and the one that stays zero."""
    runner = TorchRunner(small_model, blocks=9, block_tokens=SIZE)
    held = sum(tensor.nbytes for tensor in vars(runner).values() if isinstance(tensor, Tensor))
    assert held == cache_bytes(SMALL, 11 * SIZE, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cache_has_the_type_of_the_weights(small_model: Llama, dtype: torch.dtype) -> None:
    """Half the memory; chunks and single tokens together, as near to float32 as the whole pass in that type."""
    rounded = Llama(SMALL, device="cpu", dtype=dtype)
    rounded.load_state_dict(small_model.state_dict())
    runner, tables, (long, short) = new_runner(rounded), scattered(2), (random_tokens(40, 0), random_tokens(9, 1))
    run(runner, tables, {0: (0, long[:30]), 1: (0, short[:8])})
    logits = run(runner, tables, {0: (30, long[30:]), 1: (8, short[8:])})
    assert runner._keys is not None
    assert runner._keys.dtype is dtype
    with torch.inference_mode():
        for row, text in ((0, long), (1, short)):
            exact = small_model(text[None])[0, -len(logits[row]) :]
            assert logits[row].dtype is torch.float32
            assert (logits[row] - exact).abs().mean() < 0.05 * exact.std()


def test_gradients_are_not_kept(small_model: Llama) -> None:
    """The cache would tie every step's graph to the next one's, and memory would grow until the process ends."""
    assert torch.is_grad_enabled()
    logits = run(new_runner(small_model), scattered(1), {0: (0, random_tokens(3, 0))})[0]
    assert not logits.requires_grad
