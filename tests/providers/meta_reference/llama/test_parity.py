"""The network against transformers, live, on small random checkpoints of every shape of the family, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_stack_meta_reference.inference.kv_cache import KVCache
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint, save_hugging_face
from llama_stack_meta_reference.llama.model import Llama
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.providers.meta_reference.checkpoints import random_reference, scaled_rope, write_hugging_face, write_meta

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


@torch.inference_mode()
def test_greedy_tokens_equal_transformers_through_the_cache(
    reference: LlamaForCausalLM, model: Llama, prompts_BT: Tensor
) -> None:
    """What a user sees is the ids: one wrong position in the cache changes them within 64 steps."""
    prompt_BT = prompts_BT[:1, :30]
    theirs: Any = reference
    expected = theirs.generate(prompt_BT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert greedy(model, prompt_BT) == expected[0, 30:].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_every_layout_gives_the_same_network(
    layout: str, reference: LlamaForCausalLM, model: Llama, prompts_BT: Tensor, tmp_path: Path
) -> None:
    """Meta's rotary order and its split over ranks are undone exactly, so the logits are equal to the last bit."""
    other = load(write(reference, layout, tmp_path / "checkpoint"))
    assert other.config == model.config
    assert torch.equal(other(prompts_BT), model(prompts_BT))
    assert greedy(other, prompts_BT[:1, :30]) == greedy(model, prompts_BT[:1, :30])


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


def greedy(model: Llama, prompt_BT: Tensor) -> list[int]:
    cache = KVCache(model.config, slots=1, context=256, device="cpu", dtype=torch.float32)
    slot, tokens_BT, chosen = cache.allocate(), prompt_BT, list[int]()
    while len(chosen) < NEW_TOKENS:
        with cache.step([slot], [tokens_BT.shape[1]]) as view:
            state_BTD = model.hidden(tokens_BT, view)
        tokens_BT = model.logits(state_BTD[:, -1:]).argmax(-1)
        chosen.append(int(tokens_BT))
    return chosen
