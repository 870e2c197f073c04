"""One network in two processes: the same answers as in one, from any checkpoint, and one fate for all of its ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_stack_meta_reference.config import ModelConfig
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.executor import Executor, ExecutorLostError
from llama_stack_meta_reference.inference.loading import open_model
from llama_stack_meta_reference.inference.sampler import Choice
from llama_stack_meta_reference.inference.workers import Workers
from llama_stack_meta_reference.llama.parallel import Rank, possible_ranks
from pydantic import ValidationError

from llama_stack.errors import SetupError
from tests.providers.meta_reference import checkpoints, small_tokenizer
from tests.providers.meta_reference.small_llama import WORDED

PROMPT = [11, 42, 7, 7, 300, 5, 19]
SCORED = Choice(wants_logprobs=True)


def folder(tmp_path: Path, *, tied: bool = False, meta_shards: int = 0) -> Path:
    """A checkpoint with a tokenizer, in Hugging Face's layout or in Meta's."""
    model = checkpoints.random_reference(tied=tied, vocabulary=WORDED.vocab_size, kv_heads=4)
    if meta_shards:
        checkpoints.write_meta(model, tmp_path, shards=meta_shards)
        small_tokenizer.write_meta(tmp_path)
    else:
        checkpoints.write_hugging_face(model, tmp_path)
        small_tokenizer.write_hugging_face(tmp_path)
    return tmp_path


def config(folder: Path, ranks: int, **settings: object) -> ModelConfig:
    asked = {"checkpoint": str(folder), "device": "cpu", "kernels": "plain", "tensor_parallel": ranks}
    return ModelConfig.model_validate(asked | settings)


@contextmanager
def split(folder: Path, ranks: int = 2) -> Iterator[Workers]:
    with closing(Workers("m", config(folder, ranks))) as workers:
        workers.open()
        yield workers.load(WORDED.vocab_size)


def greedy(executor: Executor, count: int) -> tuple[list[int], list[float]]:
    """The likeliest ``count`` tokens after the prompt, which comes in two chunks, and all scores with them."""
    table = [5, 2, 6, 1, 0]
    executor.execute(Batch(PROMPT[:3], [0], [3], [table], []), [])
    new, start = PROMPT[3:], 3
    tokens, scores = list[int](), list[float]()
    for _ in range(count):
        (picked,) = executor.execute(Batch(new, [start], [len(new)], [table], [len(new) - 1]), [SCORED])
        assert picked is not None
        assert picked.logprob is not None
        tokens.append(picked.token)
        scores += [picked.logprob, *(logprob for _, logprob in picked.alternatives)]
        new, start = [picked.token], start + len(new)
    return tokens, scores


@pytest.mark.parametrize(("tied", "meta_shards"), [(False, 0), (True, 0), (False, 1), (False, 4)])
def test_two_ranks_answer_as_one(tmp_path: Path, tied: bool, meta_shards: int) -> None:
    """64 greedy tokens are the same and their scores within 1e-4, however the checkpoint is cut."""
    checkpoint = folder(tmp_path, tied=tied, meta_shards=meta_shards)
    with closing(open_model("m", config(checkpoint, 1)).load(WORDED.vocab_size)) as one:
        tokens, scores = greedy(one, 64)
    with split(checkpoint) as two:
        split_tokens, split_scores = greedy(two, 64)
    assert split_tokens == tokens
    assert split_scores == pytest.approx(scores, abs=1e-4)
    assert len(set(tokens)) > 5


def test_two_ranks_have_half_the_memory_each(tmp_path: Path) -> None:
    """What is shown is the sum; only the norms are on both."""
    checkpoint = folder(tmp_path)
    whole = open_model("m", config(checkpoint, 1)).facts
    with closing(Workers("m", config(checkpoint, 2))) as workers:
        facts = workers.open()
    norms = (2 * WORDED.n_layers + 1) * WORDED.dim
    assert facts.weight_bytes == whole.weight_bytes + 4 * norms
    assert facts.cache_bytes == whole.cache_bytes
    assert (facts.parameters, facts.context, facts.blocks) == (whole.parameters, whole.context, whole.blocks)


@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_die_together_and_come_back_together(tmp_path: Path, victim: int) -> None:
    """One that is left alone would wait for the other's sum for ever."""
    with split(folder(tmp_path)) as workers:
        expected = greedy(workers, 5)
        processes = [worker.process for worker in workers._workers]
        os.kill(processes[victim].pid, signal.SIGKILL)
        with pytest.raises(ExecutorLostError, match="rank [01] of 2 of model 'm'"):
            greedy(workers, 5)
        assert all(process.poll() is not None for process in processes)
        workers.reset()
        assert greedy(workers, 5) == expected
        assert workers.restarts == 1


def test_the_ranks_meet_where_nobody_else_can_go(tmp_path: Path) -> None:
    """Whoever could write there could join them; and nothing stays behind."""
    with split(folder(tmp_path)) as workers:
        assert workers._rendezvous is not None
        meeting = Path(workers._rendezvous.name)
        assert meeting.stat().st_mode & 0o777 == 0o700
    assert not meeting.exists()


def test_a_split_that_does_not_come_out_even_is_refused_with_those_that_do(tmp_path: Path) -> None:
    """8 heads cannot go to 3 ranks."""
    checkpoint = folder(tmp_path)
    refused = pytest.raises(
        SetupError, match="tensor_parallel 3 does not divide its 8 heads, 4 key.*possible: 1, 2, 4$"
    )
    with closing(Workers("m", config(checkpoint, 3))) as workers, refused:
        workers.open()


@pytest.mark.parametrize("settings", [{"kernels": "compiled"}, {"kernels": "auto", "dtype": "int8"}])
def test_compiled_kernels_are_not_split(tmp_path: Path, settings: dict[str, str]) -> None:
    """They run a whole network in one call, with no place for the ranks' sums."""
    refused = pytest.raises(SetupError, match="tensor_parallel splits it")
    with closing(Workers("m", config(folder(tmp_path), 2, **settings))) as workers, refused:
        workers.open()


@pytest.mark.parametrize(
    ("settings", "cause"), [({"process": "shared"}, "set process: own"), ({"device": "cuda:1"}, "set device: cuda$")]
)
def test_settings_that_contradict_a_split_are_refused(settings: dict[str, str], cause: str) -> None:
    """Before anything is started."""
    with pytest.raises(ValidationError, match="ranks") as refused:
        config(Path("x"), 2, **settings)
    assert cause.removesuffix("$") in str(refused.value)


def test_the_parts_of_a_weight_are_the_weight() -> None:
    """Each matrix once, each norm everywhere; by rows or by what the former matrix of the same rank gives."""
    ranks = [Rank(number, 4, Path("unused")) for number in range(4)]
    weight = torch.arange(64.0).view(8, 8)
    for name, axis in (("layers.0.attention.wq.weight", 0), ("layers.0.feed_forward.w2.weight", 1)):
        parts = [rank.part(name, weight) for rank in ranks]
        assert torch.equal(torch.cat(parts, axis), weight)
    assert all(torch.equal(rank.part("layers.0.ffn_norm.weight", weight), weight) for rank in ranks)


def test_which_splits_are_possible() -> None:
    """Llama 3 8B's heads and key/value heads go to 1, 2, 4 or 8 ranks."""
    network = replace(WORDED, dim=4096, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336, vocab_size=128256)
    assert possible_ranks(network, most=64) == [1, 2, 4, 8]
    assert sum(network.shard(4).parameter_count for _ in range(4)) == network.parameter_count + 3 * 5 * 4096
