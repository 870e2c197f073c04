from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_stack_meta_reference.inference.kv_cache import KVCache, cache_bytes
from llama_stack_meta_reference.llama.model import Llama
from torch import Tensor

from tests.providers.meta_reference.small_llama import SMALL

CONTEXT = 64


def new_cache(slots: int = 4) -> KVCache:
    return KVCache(SMALL, slots=slots, context=CONTEXT, device="cpu", dtype=torch.float32)


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def run(model: Llama, cache: KVCache, parts: dict[int, Tensor]) -> dict[int, Tensor]:
    """One ragged step: the new tokens of each slot in, their logits out."""
    counts = [len(tokens) for tokens in parts.values()]
    tokens_BT = torch.nn.utils.rnn.pad_sequence(list(parts.values()), batch_first=True)
    with cache.step(list(parts), counts) as view:
        logits_BTV = model(tokens_BT, view)
    return {slot: logits_BTV[row, :count] for row, (slot, count) in enumerate(zip(parts, counts, strict=True))}


@torch.inference_mode()
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, CONTEXT), min_size=2, max_size=4),
    cuts=st.lists(st.integers(1, 40), min_size=4, max_size=40),
    order=st.permutations(range(4)),
    arrivals=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_ragged_batches_in_any_cuts_equal_each_sequence_alone(
    small_model: Llama, lengths: list[int], cuts: list[int], order: list[int], arrivals: list[int]
) -> None:
    """Continuous batching mixes chunks of prompts with single steps: nobody may notice who else was in the batch."""
    cache = new_cache()
    slots = [cache.allocate() for _ in range(4)]
    sequences = {slots[order[seed]]: random_tokens(length, seed) for seed, length in enumerate(lengths)}
    alone = {slot: small_model(tokens[None])[0] for slot, tokens in sequences.items()}
    done = dict.fromkeys(sequences, 0)
    step = 0
    while any(done[slot] < len(tokens) for slot, tokens in sequences.items()):
        parts = {}
        for slot, tokens in sequences.items():
            if done[slot] < len(tokens) and step >= arrivals[slot]:
                parts[slot] = tokens[done[slot] : done[slot] + cuts[(step + slot) % len(cuts)]]
        for slot, logits_TV in (run(small_model, cache, parts) if parts else {}).items():
            expected = alone[slot][done[slot] : done[slot] + len(logits_TV)]
            torch.testing.assert_close(logits_TV, expected, atol=1e-4, rtol=0)
            done[slot] += len(logits_TV)
        step += 1
    assert {slot: cache.length(slot) for slot in sequences} == {slot: len(t) for slot, t in sequences.items()}


@torch.inference_mode()
def test_slots_are_accounted_for_exactly() -> None:
    """A slot lost at each cancelled request would end a server after ``slots`` of them."""
    cache = new_cache(slots=3)
    slots = [cache.allocate() for _ in range(3)]
    assert (slots, cache.free) == ([0, 1, 2], 0)
    with pytest.raises(RuntimeError, match="all 3 cache slots are in use"):
        cache.allocate()
    cache.release(1)
    assert cache.free == 1
    with pytest.raises(KeyError):
        cache.release(1)
    assert cache.allocate() == 1


@torch.inference_mode()
def test_a_reused_slot_has_nothing_of_its_last_sequence(small_model: Llama) -> None:
    """Even a sequence whose values overflowed: a mask multiplies by zero, and zero times infinity is not a number."""
    cache = new_cache(slots=2)
    poisoned, other = cache.allocate(), cache.allocate()
    with cache.step([poisoned], [CONTEXT]) as view:
        for layer in range(SMALL.n_layers):
            endless = torch.full((1, SMALL.n_kv_heads, CONTEXT, SMALL.head_dim), torch.inf)
            view.update(layer, endless, endless)
    cache.release(poisoned)
    assert cache.allocate() == poisoned
    short, long = random_tokens(3, 0), random_tokens(50, 1)
    run(small_model, cache, {poisoned: short[:2], other: long[:49]})
    logits = run(small_model, cache, {poisoned: short[2:], other: long[49:]})
    torch.testing.assert_close(logits[poisoned], small_model(short[None])[0, 2:], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_step_that_failed_can_be_run_again(small_model: Llama) -> None:
    """Memory can run out in the middle of a pass; the lengths must still be those of the last step that was whole."""
    cache = new_cache()
    slot, tokens = cache.allocate(), random_tokens(10, 0)
    run(small_model, cache, {slot: tokens[:4]})

    def run_out_of_memory() -> None:
        with cache.step([slot], [6]) as view:
            view.update(0, *[torch.ones(1, SMALL.n_kv_heads, 6, SMALL.head_dim)] * 2)
            raise MemoryError

    with pytest.raises(MemoryError):
        run_out_of_memory()
    assert cache.length(slot) == 4
    logits = run(small_model, cache, {slot: tokens[4:]})[slot]
    torch.testing.assert_close(logits, small_model(tokens[None])[0, 4:], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_step_asks_nothing_back_from_its_device() -> None:
    """A GPU that is asked in the middle of a step stands idle meanwhile; the meta device has no answers to give."""
    model = Llama(SMALL, device="meta", dtype=torch.bfloat16)
    cache = KVCache(SMALL, slots=3, context=CONTEXT, device="meta", dtype=torch.bfloat16)
    first, second, third = (cache.allocate() for _ in range(3))
    steps = {
        (first, second): [5, 3],
        (first, third): [4, 2],
        (first, second, third): [1, 1, 1],
        (second, third): [1, 1],
    }
    for rows, counts in steps.items():
        with cache.step(rows, counts) as view:
            logits_BTV = model(torch.zeros(len(rows), max(counts), dtype=torch.int64, device="meta"), view)
        assert logits_BTV.shape == (len(rows), max(counts), SMALL.vocab_size)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("rows", "counts", "message"),
    [
        ([0], [CONTEXT + 1], "holds 0 of 64 tokens; 65 more do not fit"),
        ([0, 0], [1, 1], "distinct rows"),
        ([0, 1], [1], "distinct rows"),
        ([0], [0], "distinct rows"),
        ([], [], "distinct rows"),
    ],
)
def test_a_step_that_cannot_be_is_refused(rows: list[int], counts: list[int], message: str) -> None:
    """Before anything is written: a write past a slot's end would land in another sequence."""
    cache = new_cache()
    cache.allocate(), cache.allocate()
    with pytest.raises(ValueError, match=message), cache.step(rows, counts):
        pass


def test_a_step_with_gradients_is_refused() -> None:
    """The cache would tie every step's graph to the next one's, and memory would grow until the process ends."""
    cache = new_cache()
    with pytest.raises(RuntimeError, match="inference_mode"), cache.step([cache.allocate()], [1]):
        pass


def test_cache_takes_the_bytes_that_are_planned() -> None:
    """The plan is what an operator decides by: 2 (keys and values) x layers x key heads x width x bytes of a number."""
    cache = new_cache(slots=3)
    held = sum(tensor.nbytes for tensor in vars(cache).values() if isinstance(tensor, Tensor))
    assert held == cache_bytes(SMALL, 3 * CONTEXT, torch.float32) == 2 * 2 * 2 * 8 * 4 * 3 * CONTEXT


@pytest.mark.parametrize(("slots", "context"), [(0, 8), (1, 0), (1, SMALL.max_context + 1)])
def test_a_cache_beyond_the_models_context_is_refused(slots: int, context: int) -> None:
    """Past its context a model's angles were never trained: it would answer, and badly."""
    with pytest.raises(ValueError, match=f"from 1 to {SMALL.max_context} tokens"):
        KVCache(SMALL, slots=slots, context=context, device="cpu", dtype=torch.float32)
