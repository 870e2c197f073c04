"""The network by itself: parity with transformers is test_parity.py's."""

from __future__ import annotations

import math

import pytest
import torch
from llama_stack_meta_reference.llama.config import RopeScaling
from llama_stack_meta_reference.llama.model import Llama, rotary_frequencies

from tests.providers.meta_reference.small_llama import SMALL


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_no_token_sees_what_comes_after_it(small_model: Llama) -> None:
    """A leak from the future makes training look perfect and generation useless."""
    tokens_BT = random_tokens(1, 40)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 25] = (changed_BT[0, 25] + 1) % SMALL.vocab_size
    difference_T = (small_model(tokens_BT) - small_model(changed_BT)).abs().amax(dim=(0, 2))
    assert not difference_T[:25].any()
    assert difference_T[25:].all()


@torch.inference_mode()
def test_hidden_then_logits_is_forward(small_model: Llama) -> None:
    """Callers take logits only where they need them, and must get what the whole pass would have given."""
    tokens_BT = random_tokens(2, 9)
    last_BD = small_model.hidden(tokens_BT)[:, -1]
    torch.testing.assert_close(small_model.logits(last_BD), small_model(tokens_BT)[:, -1], atol=1e-5, rtol=0)


def test_every_weight_gets_a_gradient() -> None:
    """Training runs these modules: a detached branch would leave a part of the network as it was."""
    model = Llama(SMALL, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0))
    model(random_tokens(2, 12)).logsumexp(-1).mean().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_initialize_with_one_seed_gives_one_network() -> None:
    """A training run is reproducible only if its start is; ``to_empty`` leaves whatever was in memory."""
    models = [Llama(SMALL, device="meta", dtype=torch.float32).to_empty(device="cpu") for _ in range(2)]
    for model in models:
        model.initialize(torch.Generator().manual_seed(7))
    tokens_BT = random_tokens(1, 5)
    assert torch.equal(models[0](tokens_BT), models[1](tokens_BT))


def test_config_counts_the_weights_that_the_network_has() -> None:
    """The memory plan is made from this count before anything is loaded."""
    model = Llama(SMALL, device="meta", dtype=torch.float32)
    assert SMALL.parameter_count == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_stay_float32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    """``module.to(bfloat16)`` rounds buffers too: at position 1000 an angle would be off by radians."""
    model = Llama(SMALL, device="cpu", dtype=torch.float32)
    expected = model.rotary.frequency.clone()
    model.to(dtype)
    assert model.rotary.frequency.dtype == torch.float32
    assert torch.equal(model.rotary.frequency, expected)
    with torch.inference_mode():
        assert model(random_tokens(1, 4)).dtype == torch.float32


@torch.inference_mode()
def test_bfloat16_is_near_float32(small_model: Llama) -> None:
    """The dtype of most checkpoints: norms, angles and softmax must not lose what the weights still have."""
    tokens_BT = random_tokens(1, 60)
    rounded = Llama(SMALL, device="cpu", dtype=torch.bfloat16)
    rounded.load_state_dict(small_model.state_dict())
    exact, near = small_model(tokens_BT), rounded(tokens_BT)
    assert (exact - near).abs().mean() < 0.05 * exact.std()


def test_scaling_leaves_fast_rotations_and_slows_slow_ones() -> None:
    """The published rule in its three bands, from the definition in turns per original context."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    plain = rotary_frequencies(128, 500000.0, None, "cpu").tolist()
    scaled = rotary_frequencies(128, 500000.0, scaling, "cpu").tolist()
    bands = set()
    for before, after in zip(plain, scaled, strict=True):
        turns = 8192 * before / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - 1) / 3))
        assert after == pytest.approx(before * (kept + (1 - kept) / 8), rel=1e-5)
        bands.add(kept if kept in (0.0, 1.0) else 0.5)
    assert bands == {0.0, 0.5, 1.0}
