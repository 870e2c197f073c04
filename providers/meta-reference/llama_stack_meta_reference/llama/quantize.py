"""Matrices of a network rounded to 8 or 4 bits a weight, in plain torch, on any device that it has.

    int8      a scale for each output
    int4      a scale for each 32 inputs of an output
    float8    e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), a scale for each output; the activations of a product
              are rounded to it too, each row by a scale of its own, so that no row disturbs another

Embeddings and norms stay as they are; a tied output is a rounded copy of the embeddings. Weights are rounded one by one
as they are read (checkpoint.py), so that the network is never there in full.

Shape suffixes: O outputs, I inputs, J groups of inputs, N rows, H half a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LlamaConfig
from .model import Llama

_ROUNDED_AT_ONCE = 4096
"""Outputs: what is in between while a weight is rounded takes the memory of so many."""
_GROUP = 32
_LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_SCALE = 1e-30
"""Of a row or an output that is all zeros, which has no scale."""


class RoundedLinear(nn.Module, ABC):
    """Stands for an ``nn.Linear`` without bias: (..., I) in, (..., O) out, in the dtype of what comes in."""

    kind: ClassVar[str]
    """What a distribution calls the type."""
    weight: Tensor
    """First dimension O."""
    scale: Tensor

    def __init__(self, inputs: int, outputs: int, *, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows_NI = x.reshape(-1, self.inputs)
        if not len(rows_NI):  # not every kernel takes none
            return x.new_empty(*x.shape[:-1], self.outputs)
        return self._product(rows_NI).view(*x.shape[:-1], self.outputs)

    @torch.no_grad()
    def fill(self, weight_OI: Tensor) -> None:
        """Round a weight, which must be finite, and keep it."""
        for first in range(0, self.outputs, _ROUNDED_AT_ONCE):
            some = slice(first, first + _ROUNDED_AT_ONCE)
            self.weight[some], self.scale[some] = self._rounded(weight_OI[some].to(self.weight.device).float())

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return (O, I) what the rounded weights stand for."""

    @staticmethod
    @abstractmethod
    def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """What to keep of float32 weights: themselves, rounded, and the scales."""

    def _product(self, rows_NI: Tensor) -> Tensor:
        return F.linear(rows_NI, self.dense(rows_NI.dtype))


class Int8Linear(RoundedLinear):
    """Weights (O, I) int8, scales (O, 1) float32."""

    kind = "int8"

    def __init__(self, inputs: int, outputs: int, *, device: torch.device | str) -> None:
        weight = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
        super().__init__(inputs, outputs, weight=weight, scale=torch.empty(outputs, 1, device=device))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) * self.scale.to(dtype)

    @staticmethod
    def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        scale_O1 = _scale(weight_OI, 127)
        return (weight_OI / scale_O1).round(), scale_O1


class Int4Linear(RoundedLinear):
    """Weights (O, J, H) uint8, each two of -8 to 7: the low bits of the first half of a group, the high of the second.

    Scales (O, J, 1) bfloat16, negative where the weight of the largest size is positive: that one is exactly -8. Inputs
    that fill no group are followed by zeros.
    """

    kind = "int4"

    def __init__(self, inputs: int, outputs: int, *, device: torch.device | str) -> None:
        groups = -(-inputs // _GROUP)
        weight = torch.empty(outputs, groups, _GROUP // 2, dtype=torch.uint8, device=device)
        scale = torch.empty(outputs, groups, 1, dtype=torch.bfloat16, device=device)
        super().__init__(inputs, outputs, weight=weight, scale=scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        both = torch.cat((self.weight & 15, self.weight >> 4), dim=-1).to(dtype) - 8
        return (both * self.scale.to(dtype)).flatten(1)[:, : self.inputs]

    @staticmethod
    def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        padded_OI = F.pad(weight_OI, (0, -weight_OI.shape[1] % _GROUP))
        groups = padded_OI.view(len(padded_OI), -1, _GROUP)
        largest_OJ1 = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scale_OJ1 = (largest_OJ1 / -8).bfloat16()
        divisor_OJ1 = torch.where(scale_OJ1 == 0, 1.0, scale_OJ1.float())
        low_OJH, high_OJH = ((groups / divisor_OJ1).round().clamp(-8, 7) + 8).to(torch.uint8).chunk(2, dim=-1)
        return low_OJH | high_OJH << 4, scale_OJ1


class Float8Linear(RoundedLinear):
    """Weights (O, I) float8_e4m3fn, scales (O, 1) float32."""

    kind = "float8"

    def __init__(self, inputs: int, outputs: int, *, device: torch.device | str) -> None:
        weight = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device=device)
        super().__init__(inputs, outputs, weight=weight, scale=torch.empty(outputs, 1, device=device))
        # What the GPUs' kernels take; other matrices are multiplied as floats.
        self._has_kernel = inputs % 16 == 0 and outputs % 16 == 0

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) * self.scale.to(dtype)

    @staticmethod
    def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        scale_O1 = _scale(weight_OI, _LARGEST_FLOAT8)
        # Divided, the largest may come out above what float8 has by a rounding, and would be no number in it.
        return (weight_OI / scale_O1).clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8).to(torch.float8_e4m3fn), scale_O1

    def _product(self, rows_NI: Tensor) -> Tensor:
        if not self._has_kernel:
            return super()._product(rows_NI)
        rounded_NI, scale_N1 = self._rounded(rows_NI.float())
        return torch._scaled_mm(
            rounded_NI, self.weight.T, scale_a=scale_N1, scale_b=self.scale.T, out_dtype=rows_NI.dtype
        )


KINDS: Mapping[str, type[Int8Linear | Int4Linear | Float8Linear]] = {
    matrix.kind: matrix for matrix in (Int8Linear, Int4Linear, Float8Linear)
}
"""The types to which matrices can be rounded, by the names that a distribution uses."""


def empty_rounded(config: LlamaConfig, kind: str, *, device: torch.device | str, dtype: torch.dtype) -> Llama:
    """A network whose matrices are of one of ``KINDS``, with weights that hold anything; the rest of it in ``dtype``.

    It always has an ``output`` of its own.
    """
    model = Llama(config, device="meta", dtype=dtype)
    matrices = {name: matrix for name, matrix in model.named_modules() if isinstance(matrix, nn.Linear)}
    sizes = {name: (matrix.in_features, matrix.out_features) for name, matrix in matrices.items()}
    for name, (inputs, outputs) in (sizes | {"output": (config.dim, config.vocab_size)}).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, KINDS[kind](inputs, outputs, device="meta"))
    return model.to_empty(device=device)


def stored_matrices(model: Llama) -> dict[str, RoundedLinear]:
    """The rounded matrices of a network by their names, but for an output that is a copy of the embeddings."""
    return {
        name: matrix
        for name, matrix in model.named_modules()
        if isinstance(matrix, RoundedLinear) and not (name == "output" and model.config.tied_embeddings)
    }


def _scale(values: Tensor, largest: float) -> Tensor:
    """What to divide each row by, so that its largest value becomes ``largest``. NaN and infinity stay in their row."""
    return (values.abs().amax(-1, keepdim=True) / largest).clamp(min=_SMALLEST_SCALE)
