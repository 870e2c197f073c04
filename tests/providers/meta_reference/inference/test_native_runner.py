"""The compiled runner gives what the plain network gives: ragged, for every shape, within each kind's error."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from llama_stack_meta_reference.inference import native_runner
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.native_runner import NativeRunner, NativeStorage
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.model import Llama
from torch import Tensor

from tests.providers.meta_reference.kernels import NEEDS_KERNELS
from tests.providers.meta_reference.small_llama import SMALL

pytestmark = [NEEDS_KERNELS, pytest.mark.usefixtures("instructions")]

CONTEXT = 1200
SHAPES = {
    "grouped": replace(SMALL, max_context=CONTEXT),
    "odd head width, tied": replace(
        SMALL, dim=160, n_heads=4, head_dim=40, ffn_dim=200, vocab_size=251, tied_embeddings=True, max_context=CONTEXT
    ),
    "multi-head": replace(SMALL, n_heads=4, n_kv_heads=4, head_dim=16, max_context=CONTEXT),
    "wide groups": replace(SMALL, n_heads=12, n_kv_heads=1, head_dim=64, max_context=CONTEXT),
}


def network(config: LlamaConfig) -> Llama:
    model = Llama(config, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0), std=0.06)
    return model.requires_grad_(False)


def native(model: Llama, kind: str = "float32", blocks: int = 240) -> NativeRunner:
    return NativeRunner(deepcopy(model), kind=kind, blocks=blocks, context=model.config.max_context)


def tokens_of(config: LlamaConfig, count: int, seed: int) -> list[int]:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_steps_give_what_one_whole_pass_gives(shape: str) -> None:
    """Chunks and single tokens of several sequences in one step, over scattered blocks, past one span of keys."""
    model = network(SHAPES[shape])
    runner, draw = native(model), random.Random(0)
    blocks = draw.sample(range(240), 240)
    sequences = [tokens_of(model.config, count, seed) for seed, count in enumerate((1150, 700, 33, 1))]
    tables = [blocks[row * 75 : row * 75 + 75] for row in range(3)] + [blocks[225:]]
    alone = [model(torch.tensor([tokens]))[0] for tokens in sequences]
    done = [0] * len(sequences)
    while any(count < len(tokens) for count, tokens in zip(done, sequences, strict=True)):
        batch, expected = Batch(), list[Tensor]()
        for row, tokens in enumerate(sequences):
            count = min(draw.choice((1, 1, 2, 7, 16, 250)), len(tokens) - done[row])
            if not count:
                continue
            batch.sampled += range(len(batch.tokens), len(batch.tokens) + count)
            batch.tokens += tokens[done[row] : done[row] + count]
            batch.starts.append(done[row])
            batch.counts.append(count)
            batch.tables.append(tables[row])
            expected.append(alone[row][done[row] : done[row] + count])
            done[row] += count
        torch.testing.assert_close(runner.run(batch), torch.cat(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "bound"), [("float16", 0.002), ("int8", 0.05), ("int4", 0.6)])
def test_the_error_of_a_kind_of_weights_is_bounded(kind: str, bound: float) -> None:
    """Root mean square error of the logits by their spread: what fewer bits cost on a random network."""
    model = network(SHAPES["odd head width, tied"])
    tokens = tokens_of(model.config, 200, 1)
    batch = Batch(tokens, [0], [200], [list(range(13))], list(range(200)))
    expected = model(torch.tensor([tokens]))[0]
    error = (native(model, kind).run(batch) - expected).pow(2).mean().sqrt() / expected.std()
    assert error < bound, float(error)


def test_logits_come_for_the_places_that_are_asked_for() -> None:
    """The output layer is the largest of all: a prompt needs it at its last token only, a chunk before not at all."""
    model = network(SHAPES["grouped"])
    runner, tokens = native(model), tokens_of(model.config, 40, 0)
    batch = Batch(tokens, [0], [40], [[3, 1, 2]], [])
    assert runner.run(batch).shape == (0, model.config.vocab_size)
    batch.sampled = [7, 39]
    expected = model(torch.tensor([tokens]))[0, [7, 39]]
    torch.testing.assert_close(runner.run(batch), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_what_is_left_in_a_block_reaches_nobody(poison: float) -> None:
    """Even of a sequence whose values overflowed: zero times infinity is no number."""
    model = network(SHAPES["grouped"])
    runner = native(model, blocks=4)
    assert runner._keys is not None
    assert runner._values is not None
    runner._keys.fill_(poison)
    runner._values.fill_(poison)
    first, second = tokens_of(model.config, 20, 0), tokens_of(model.config, 5, 1)
    batch = Batch([*first, *second], [0, 0], [20, 5], [[2, 0], [3]], [19, 24])
    expected = torch.stack([model(torch.tensor([tokens]))[0, -1] for tokens in (first, second)])
    torch.testing.assert_close(runner.run(batch), expected, atol=1e-4, rtol=0)
    runner.reset()
    assert not runner._keys.any()


def test_a_sequence_that_is_no_number_stays_alone() -> None:
    """One request fails, not the batch."""
    model = network(SHAPES["grouped"])
    model.tok_embeddings.weight[17] = torch.nan
    logits_RV = native(model).run(Batch([17, 4, 5], [0, 0, 0], [1, 1, 1], [[0], [1], [2]], [0, 1, 2]))
    assert logits_RV.isfinite().all(1).tolist() == [False, True, True]


def test_room_that_could_not_be_had_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine goes on after a step that had no memory; the next one, were it small enough for the old room, must
    write neither beyond it nor where it was."""
    model = network(SMALL)
    runner, asked = native(model), list[int]()
    tokens = tokens_of(SMALL, 40, 0)
    runner.run(Batch(tokens[:1], [0], [1], [[0]], [0]))

    def no_memory(rows: int, inputs: int) -> None:
        asked.append(rows)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(native_runner, "Scratch", no_memory)
        for count in (40, 40, 1):
            with pytest.raises(MemoryError):
                runner.run(Batch(tokens[:count], [0], [count], [[0, 1, 2]], [count - 1]))
    assert asked == [40, 40, 1]
    expected = model(torch.tensor([tokens]))[0, [39]]
    torch.testing.assert_close(runner.run(Batch(tokens, [0], [40], [[0, 1, 2]], [39])), expected, atol=1e-4, rtol=0)


def test_two_threads_give_what_one_gives() -> None:
    """Each number is made by one thread whatever their count, so not even rounding differs."""
    model, logits = network(SHAPES["grouped"]), []
    tokens = tokens_of(model.config, 100, 2)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            runner = native(model, "int8")
        finally:
            torch.set_num_threads(1)
        first = runner.run(Batch(tokens, [0], [100], [list(range(7))], [99])).clone()
        later = [runner.run(Batch([tokens[at]], [100 + at], [1], [list(range(9))], [0])).clone() for at in range(40)]
        logits.append(torch.cat([first, *later]))
    assert torch.equal(*logits)


def test_the_memory_plan_counts_what_the_runner_takes() -> None:
    """An operator learns before loading what will not fit: the figures must be those of this runner."""
    for kind in ("float32", "float16", "int8", "int4"):
        config = replace(SMALL, dim=128, ffn_dim=256, n_heads=8, head_dim=16, tied_embeddings=True)
        runner = NativeRunner(network(config), kind=kind, blocks=10, context=128)
        storage = NativeStorage(kind, torch.float32)
        assert runner._keys is not None
        assert 2 * runner._keys.nbytes == 160 * storage.cache_bytes_per_token(config)
        taken = sum(matrix.bytes for matrix in runner._weights) + config.vocab_size * config.dim * 4
        assert storage.weight_bytes(config) == pytest.approx(taken, rel=0.01)
