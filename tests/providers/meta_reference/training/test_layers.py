"""Frozen matrices: NF4 as published, and products that are the plain ones."""

from __future__ import annotations

import pytest
import torch
from llama_stack_meta_reference.training.layers import NF4_LEVELS, AdaptedLinear, FrozenLinear, NF4Linear, dense
from torch import Tensor, nn


def test_the_levels_are_the_normal_distributions_quantiles() -> None:
    """As bitsandbytes makes its codebook: quantiles evenly apart on either side of zero, scaled to one."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat((below, torch.zeros(1, dtype=torch.float64), above)).sort().values
    assert torch.allclose(torch.tensor(NF4_LEVELS, dtype=torch.float64), levels / levels.max(), atol=2e-7)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 192, generator=torch.Generator().manual_seed(0))


def rounded(weight: Tensor) -> NF4Linear:
    matrix = NF4Linear(weight.shape[1], weight.shape[0], device="cpu")
    matrix.fill(weight)
    return matrix


def test_each_weight_is_the_nearest_level_of_its_group(weight: Tensor) -> None:
    found = dense(rounded(weight), torch.float32)
    scale = weight.view(24, 3, 64).abs().amax(-1, keepdim=True)
    distances = (weight.view(24, 3, 64, 1) / scale[..., None] - torch.tensor(NF4_LEVELS)).abs()
    expected = torch.tensor(NF4_LEVELS)[distances.argmin(-1)] * scale
    assert torch.allclose(found.view(24, 3, 64), expected)
    assert (found - weight).norm() / weight.norm() < 0.1


def test_the_bytes_are_those_of_bitsandbytes(weight: Tensor) -> None:
    """What its ``quantize_4bit`` (0.50.2, blocks of 64, nf4) makes of the same matrix; all of it was found equal."""
    matrix = rounded(weight)
    assert matrix.weight.flatten()[:8].tolist() == [68, 102, 169, 97, 131, 136, 123, 182]
    assert matrix.scale.flatten()[:3].tolist() == [3.4105026721954346, 2.6133224964141846, 1.9506571292877197]


def test_a_group_that_is_not_full_and_one_of_zeros(weight: Tensor) -> None:
    weight = weight[:, :100].clone()
    weight[3] = 0
    found = dense(rounded(weight), torch.float32)
    assert found.shape == weight.shape
    assert torch.equal(found[3], weight[3])


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight)
    return made


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_a_frozen_product_is_that_of_the_widened_weight(kind: str, weight: Tensor) -> None:
    """In float32, whatever the weight is stored in, and with the gradient of its input alone."""
    matrix = rounded(weight) if kind == "nf4" else linear(weight.to(getattr(torch, kind)))
    x = torch.randn(2, 5, 192, requires_grad=True)
    output = FrozenLinear(matrix)(x)
    expected = x @ dense(matrix, torch.float32).T
    assert output.dtype == torch.float32
    assert torch.allclose(output, expected, atol=1e-5)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-3)
    assert not any(w.requires_grad for w in matrix.parameters())


def test_a_frozen_matrix_keeps_no_input(weight: Tensor) -> None:
    """What is kept for gradients is most of a training's memory."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(5, 192, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        FrozenLinear(linear(weight))(x)
    assert kept == []


@pytest.mark.parametrize("has_magnitude", [False, True])
def test_a_new_adapter_changes_nothing(has_magnitude: bool, weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    adapted = AdaptedLinear(linear(weight), 4, 2.0, has_magnitude=has_magnitude, generator=generator)
    x = torch.randn(5, 192)
    assert torch.allclose(adapted(x), x @ weight.T, atol=1e-4)
    assert torch.allclose(adapted.effective(), weight, atol=1e-5)
