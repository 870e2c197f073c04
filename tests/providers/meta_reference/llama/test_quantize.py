"""Rounded matrices give what the floats gave, within what each type states, and no row sees another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.runner import TorchRunner
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint, save_hugging_face
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.quantize import KINDS, RoundedLinear
from torch import Tensor

from tests.providers.meta_reference.small_llama import SMALL

ERRORS = {"int8": 0.008, "int4": 0.095, "float8": 0.04}
"""The largest relative error of a product of normal numbers; bfloat16's own is 0.003."""
LOGIT_ERRORS = {"int8": 0.03, "int4": 0.35, "float8": 0.12}
"""Of the logits of a random network: root mean square over their spread."""
SHAPES = {
    "grouped": SMALL,
    "odd sizes, tied": replace(
        SMALL, dim=160, n_heads=4, head_dim=40, ffn_dim=200, vocab_size=251, tied_embeddings=True
    ),
    "multi-head": replace(SMALL, n_heads=4, n_kv_heads=4, head_dim=16),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(kind: str, weight_OI: Tensor) -> RoundedLinear:
    rounded = KINDS[kind](weight_OI.shape[1], weight_OI.shape[0], device="cpu")
    rounded.fill(weight_OI)
    return rounded


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 256), (250, 160), (48, 100), (5000, 33)])
def test_a_product_is_right_within_the_error_of_its_type(
    kind: str, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    """Groups that the inputs do not fill, sizes that no GPU kernel takes, more outputs than are rounded at once."""
    weight_OI = random(outputs, inputs) * 0.05
    rounded = matrix(kind, weight_OI)
    for rows in (2, 70):
        values_NI = random(rows, inputs, seed=rows).to(dtype)
        product_NO = rounded(values_NI)
        assert product_NO.dtype is dtype
        assert error(product_NO, values_NI.float() @ weight_OI.T) < ERRORS[kind]
    assert torch.equal(rounded(values_NI[None]), product_NO[None])
    assert rounded(values_NI[:0]).shape == (0, outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_all_sizes_keep_their_relative_error(kind: str) -> None:
    """Each output has its own scale: a large one must not round its small neighbours to nothing."""
    weight_OI = random(32, 64) * torch.logspace(-12, 12, 32)[:, None]
    dense_OI = matrix(kind, weight_OI).dense(torch.float32)
    assert max(error(found, expected) for found, expected in zip(dense_OI, weight_OI, strict=True)) < 0.12
    zeros = matrix(kind, torch.zeros(32, 64))
    assert torch.equal(zeros(torch.ones(2, 64)), torch.zeros(2, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loud_row_does_not_disturb_the_others(kind: str) -> None:
    """Where activations are rounded, each row is by itself: with one scale for all, a loud one would cost the rest."""
    rounded, values_NI = matrix(kind, random(64, 256)), random(8, 256, seed=1)
    calm_NO = rounded(values_NI)
    values_NI[3] *= 20
    loud_NO = rounded(values_NI)
    others = [row for row in range(8) if row != 3]
    torch.testing.assert_close(loud_NO[others], calm_NO[others], atol=1e-5, rtol=0)
    assert error(loud_NO[3], 20 * calm_NO[3]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none_and_stays_in_its_row(kind: str, poison: float) -> None:
    """Rounded it might look like a number, and the engine could not tell that the network broke."""
    values_NI = random(5, 128)
    values_NI[2, 7] = poison
    is_finite_N = matrix(kind, random(32, 128, seed=1))(values_NI).isfinite().all(1)
    assert is_finite_N.tolist() == [True, True, False, True, True]


def network(config: LlamaConfig) -> Llama:
    model = Llama(config, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0), std=0.06)
    return model.requires_grad_(False)


def rounded_network(model: Llama, kind: str, folder: Path) -> Llama:
    save_hugging_face(model, folder)
    return load_model(open_checkpoint(folder), device="cpu", dtype=torch.float32, rounding=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_the_logits_is_bounded(kind: str, shape: str, tmp_path: Path) -> None:
    """What fewer bits cost on a random network, the tied output included."""
    model = network(SHAPES[shape])
    tokens_BT = torch.randint(0, model.config.vocab_size, (1, 120), generator=torch.Generator().manual_seed(1))
    expected = model(tokens_BT)
    rounded = rounded_network(model, kind, tmp_path)
    found = (rounded(tokens_BT) - expected).pow(2).mean().sqrt() / expected.std()
    assert 0 < found < LOGIT_ERRORS[kind], float(found)


@pytest.mark.parametrize("kind", KINDS)
def test_all_matrices_are_rounded_and_nothing_else(kind: str, tmp_path: Path) -> None:
    """One that is left out costs more memory than was planned, and nobody would notice."""
    rounded = rounded_network(network(SHAPES["odd sizes, tied"]), kind, tmp_path)
    names = {name for name, module in rounded.named_modules() if isinstance(module, RoundedLinear)}
    assert len(names) == 2 * 7 + 1
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in rounded.named_parameters()} == {
        "tok_embeddings",
        "attention_norm",
        "ffn_norm",
        "norm",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_who_else_is_in_the_batch_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Ragged steps over rounded weights: together as alone."""
    model = rounded_network(network(SMALL), kind, tmp_path)
    prompts = [[5, 9, 70, 3], [8, 8, 1], [200, 100, 50, 25, 12]]
    runner = TorchRunner(model, blocks=6)
    alone = [runner.run(Batch(p, [0], [len(p)], [[row]], [len(p) - 1])) for row, p in enumerate(prompts)]
    counts = [len(prompt) for prompt in prompts]
    together = Batch([t for p in prompts for t in p], [0, 0, 0], counts, [[3], [4], [5]], [3, 6, 11])
    torch.testing.assert_close(runner.run(together), torch.cat(alone), atol=2e-3, rtol=0)
