"""Packed matrices: what the kernels multiply is what was packed, within the error that each kind states."""

from __future__ import annotations

import pytest
import torch
from llama_stack_meta_reference.native.library import KINDS
from llama_stack_meta_reference.native.matrix import PackedMatrix, zeros_to_stream
from torch import Tensor

from tests.providers.meta_reference.kernels import NEEDS_KERNELS

pytestmark = [NEEDS_KERNELS, pytest.mark.usefixtures("instructions")]

ERRORS = {"float32": 1e-6, "float16": 4e-4, "int8": 1.2e-2, "int4": 0.13}
"""The largest relative error of a product of random numbers, float16's against weights that it had to round."""
ROWS = [1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 29, 200]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 64), (40, 100), (250, 160), (64, 2048)])
def test_products_are_right_for_any_number_of_rows(kind: str, outputs: int, inputs: int) -> None:
    """Tiles, their remainders, padded inputs and outputs, inputs in parts: each has its own way to be wrong."""
    weights_OI = random(outputs, inputs) * 0.05
    matrix = PackedMatrix(kind, [weights_OI])
    for rows in ROWS:
        values_NI = random(rows, inputs, seed=rows)
        product_NO = matrix.product(values_NI)
        assert product_NO.shape == (rows, outputs)
        # Of one product alone the rounding of the whole is the rounding of its few terms.
        slack = 1.0 if outputs * rows * inputs > 5000 else 4.0
        assert error(product_NO, values_NI @ weights_OI.T) < slack * ERRORS[kind], rows


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_and_inputs_take_the_way_in_parts(kind: str) -> None:
    """Beyond what fits the cache, inputs go in parts whose sums are added up."""
    weights_OI, values_NI = random(48, 2112) * 0.05, random(700, 2112, seed=1)
    product_NO = PackedMatrix(kind, [weights_OI]).product(values_NI)
    assert error(product_NO, values_NI @ weights_OI.T) < ERRORS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loud_row_does_not_disturb_the_others(kind: str) -> None:
    """Activations are rounded row by row: with one scale for all, a loud row would cost the others their bits."""
    matrix, values_NI = PackedMatrix(kind, [random(64, 256)]), random(8, 256, seed=1)
    calm_NO = matrix.product(values_NI)
    values_NI[3] *= 20
    loud_NO = matrix.product(values_NI)
    others = [row for row in range(8) if row != 3]
    assert torch.equal(loud_NO[others], calm_NO[others])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none_and_stays_in_its_row(kind: str, poison: float) -> None:
    """Rounded to int8 it would look like a number, and the engine could not tell that the network broke."""
    values_NI = random(5, 128)
    values_NI[2, 7] = poison
    is_finite_N = PackedMatrix(kind, [random(32, 128, seed=1)]).product(values_NI).isfinite().all(1)
    assert is_finite_N.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_parts_begin_at_whole_panels(kind: str) -> None:
    """The network reads two matrices as one, and must know where the second begins."""
    first_OI, second_OI, values_NI = random(20, 64), random(9, 64, seed=1), random(3, 64, seed=2)
    product_NO = PackedMatrix(kind, [first_OI, second_OI]).product(values_NI)
    assert product_NO.shape == (3, 32 + 9)
    for part_OI, begin in ((first_OI, 0), (second_OI, 32)):
        alone_NO = PackedMatrix(kind, [part_OI]).product(values_NI)
        assert torch.equal(product_NO[:, begin : begin + len(part_OI)], alone_NO)


def test_weights_beyond_float16_are_refused() -> None:
    """They would become infinite, and every answer noise."""
    weights_OI = torch.full((16, 64), 70000.0)
    with pytest.raises(ValueError, match="beyond 65504 cannot be held as float16; use float32"):
        PackedMatrix("float16", [weights_OI])
    assert PackedMatrix("float32", [weights_OI]).product(torch.ones(1, 64)).isfinite().all()


def test_memory_that_is_not_there_is_said_to_be_missing() -> None:
    """As torch's own does: whoever loads a model answers for that, and for nothing else that a system may report."""
    with pytest.raises(MemoryError, match="no memory for 1125899906842624 bytes"):
        zeros_to_stream(1 << 50, torch.uint8)
    assert not zeros_to_stream(3, torch.float16).any()
    assert zeros_to_stream(0, torch.float32).shape == (0,)
