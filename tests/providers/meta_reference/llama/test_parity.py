"""The network against transformers, live, on small random checkpoints of every shape of the family, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_stack_meta_reference.inference.sampler import Sampler
from llama_stack_meta_reference.inference.scheduler import Sequence
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint, save_hugging_face
from llama_stack_meta_reference.llama.model import Llama
from torch import Tensor
from transformers import LlamaForCausalLM

from llama_stack.apis.common import SamplingParams
from tests.providers.meta_reference.checkpoints import random_reference, scaled_rope, write_hugging_face, write_meta
from tests.providers.meta_reference.kernels import NEEDS_KERNELS
from tests.providers.meta_reference.stepping import Stepper

TOLERANCE = 1e-4
NEW_TOKENS = 64

SHAPES: dict[str, Callable[[], LlamaForCausalLM]] = {
    "llama-3": lambda: random_reference(heads=8, kv_heads=2),
    "llama-3.1": lambda: random_reference(heads=8, kv_heads=2, rope=scaled_rope(8.0, 64)),
    "llama-3.2": lambda: random_reference(heads=8, kv_heads=4, rope=scaled_rope(32.0, 64), tied=True),
    "llama-3.3": lambda: random_reference(dim=128, heads=32, kv_heads=4, ffn_dim=256, rope=scaled_rope(8.0, 64)),
    "multi-head": lambda: random_reference(heads=4, kv_heads=4),
}
LAYOUTS = ["hugging-face", "hugging-face sharded", "meta x1", "meta x2", "meta x4", "meta x2 split columns"]


def write(reference: LlamaForCausalLM, layout: str, folder: Path) -> Path:
    if layout.startswith("hugging-face"):
        return write_hugging_face(reference, folder, shard_bytes=100_000 if "sharded" in layout else None)
    return write_meta(reference, folder, shards=int(layout.split()[1][1:]), split_vocabulary="columns" not in layout)


def load(folder: Path) -> Llama:
    return load_model(open_checkpoint(folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module", params=SHAPES)
def reference(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return SHAPES[request.param]()


@pytest.fixture(scope="module")
def model(reference: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return load(write_hugging_face(reference, tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def prompts_BT(reference: LlamaForCausalLM) -> Tensor:
    return torch.randint(0, reference.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_logits_equal_transformers_past_the_original_context(
    reference: LlamaForCausalLM, model: Llama, prompts_BT: Tensor
) -> None:
    """A wrong angle, norm, grouping or scaling shows here: 200 tokens are three times the context that is stretched."""
    expected = reference(prompts_BT).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(prompts_BT), expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(params=["plain", pytest.param("compiled", marks=NEEDS_KERNELS)])
def kernels(request: pytest.FixtureRequest) -> str:
    """Each runner in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def expected(reference: LlamaForCausalLM, prompts_BT: Tensor) -> list[int]:
    """What transformers writes after the first 30 tokens of the first prompt."""
    theirs: Any = reference
    text = theirs.generate(
        prompts_BT[:1, :30], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    tokens: list[int] = text[0, 30:].tolist()
    return tokens


def test_greedy_tokens_equal_transformers_through_the_cache(
    kernels: str, model: Llama, prompts_BT: Tensor, expected: list[int]
) -> None:
    """What a user sees is the ids: one wrong position in the cache changes them within 64 steps."""
    assert greedy(model, prompts_BT[0, :30].tolist(), kernels=kernels) == expected


@pytest.mark.parametrize("prefill_tokens", [1, 5, 15, 16, 17, 29, 30])
def test_greedy_tokens_equal_transformers_however_the_prompt_is_cut(
    kernels: str, model: Llama, prompts_BT: Tensor, expected: list[int], prefill_tokens: int
) -> None:
    """Chunked prefill: the cuts fall before, on and after the ends of blocks."""
    assert greedy(model, prompts_BT[0, :30].tolist(), prefill_tokens=prefill_tokens, kernels=kernels) == expected


def test_greedy_tokens_equal_transformers_among_strangers(
    kernels: str, model: Llama, prompts_BT: Tensor, expected: list[int]
) -> None:
    """Continuous batching: others of all lengths come and go in the same steps, and a stranger shares the beginning."""
    prompt = prompts_BT[0, :30].tolist()
    strangers = [prompts_BT[1, :length].tolist() for length in (1, 16, 77, 120)]
    crowd = [*strangers[:2], prompt, *strangers[2:], [*prompt[:20], 1, 2]]
    answers = Stepper(model, kernels=kernels, prefill_tokens=40, max_sequences=4).generate(crowd, NEW_TOKENS)
    assert answers[2] == expected


def test_greedy_tokens_equal_transformers_after_preemption(
    kernels: str, model: Llama, prompts_BT: Tensor, expected: list[int]
) -> None:
    """A sequence that gave its blocks up is read again with what it had written, and nobody can tell."""
    stepper = Stepper(model, kernels=kernels, blocks=13)
    elder, prompt = prompts_BT[1, :30].tolist(), prompts_BT[0, :30].tolist()
    answers = stepper.generate([elder, prompt, elder[::-1]], NEW_TOKENS)
    assert stepper.scheduler.metrics.preemptions
    assert answers[1] == expected


def test_greedy_tokens_equal_transformers_from_a_beginning_that_others_read(
    kernels: str, model: Llama, prompts_BT: Tensor, expected: list[int]
) -> None:
    """Prefix reuse: of prompts and of what was generated, as the next turn of a chat has it."""
    prompt = prompts_BT[0, :30].tolist()
    stepper = Stepper(model, kernels=kernels)
    stepper.generate([[*prompt[:17], 1]], 3)
    assert stepper.generate([prompt], 40) == [expected[:40]]
    steps = stepper.steps
    assert stepper.generate([prompt + expected[:35]], NEW_TOKENS - 35) == [expected[35:]]
    assert stepper.steps - steps == NEW_TOKENS - 35


def test_greedy_tokens_equal_transformers_with_guessed_tokens(
    kernels: str, model: Llama, prompts_BT: Tensor, expected: list[int]
) -> None:
    """Look-up decoding changes how many tokens a step gives, never which; strangers are guessed for beside it.

    A copy of the answer in the prompt would change it, so the guesses come from one that was told before: right at
    first, wrong at last.
    """
    told = [*expected[:50], *expected[:14]]
    sequence = Sequence(prompts_BT[0, :30].tolist(), 30 + NEW_TOKENS, Sampler(SamplingParams()), drafter=Told(told))
    stepper = Stepper(model, kernels=kernels, lookup_tokens=8)
    stepper.scheduler.add([sequence])
    strangers = stepper.generate([[1, 2, 3] * 5, prompts_BT[1, :50].tolist()], NEW_TOKENS)
    assert sequence.tokens[30:] == expected
    assert stepper.scheduler.metrics.accepted_tokens >= 40
    assert strangers == Stepper(model, kernels=kernels).generate(
        [[1, 2, 3] * 5, prompts_BT[1, :50].tolist()], NEW_TOKENS
    )


class Told:
    """A ``Drafter`` that was told the answer to a prompt of 30 tokens, more or less."""

    def __init__(self, told: list[int]) -> None:
        self._told = told

    def propose(self, tokens: list[int], max_tokens: int) -> list[int]:
        done = len(tokens) - 30
        return self._told[done : done + max_tokens]

    def learn(self, proposed: int, accepted: int) -> None:
        pass


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_every_layout_gives_the_same_network(
    layout: str, reference: LlamaForCausalLM, model: Llama, prompts_BT: Tensor, tmp_path: Path
) -> None:
    """Meta's rotary order and its split over ranks are undone exactly, so the logits are equal to the last bit."""
    other = load(write(reference, layout, tmp_path / "checkpoint"))
    assert other.config == model.config
    assert torch.equal(other(prompts_BT), model(prompts_BT))
    assert greedy(other, prompts_BT[0, :30].tolist()) == greedy(model, prompts_BT[0, :30].tolist())


@torch.inference_mode()
def test_transformers_reads_what_we_save(model: Llama, prompts_BT: Tensor, tmp_path: Path) -> None:
    """What was trained here can be served elsewhere."""
    save_hugging_face(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(prompts_BT).logits, model(prompts_BT), atol=TOLERANCE, rtol=0)


def test_scaling_matters_in_the_shapes_that_have_it(prompts_BT: Tensor) -> None:
    """The parity of scaled shapes would prove nothing if the scaling did not move the logits at these lengths."""
    scaled, plain = random_reference(rope=scaled_rope(8.0, 64)), random_reference()
    with torch.inference_mode():
        difference = (scaled(prompts_BT).logits - plain(prompts_BT).logits).abs().max()
    assert difference > 100 * TOLERANCE


def greedy(model: Llama, prompt: list[int], prefill_tokens: int = 512, kernels: str = "plain") -> list[int]:
    return Stepper(model, prefill_tokens=prefill_tokens, kernels=kernels).generate([prompt], NEW_TOKENS)[0]
