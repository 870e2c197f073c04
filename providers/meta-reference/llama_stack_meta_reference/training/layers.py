"""Matrices in training: frozen ones in any stored type, and what low-rank adapters add to them.

    frozen    y = W x
    LoRA      y = W x + s up (down x)                    Hu et al. 2021, arXiv:2106.09685
    DoRA      y = m / |W + s up down| * (LoRA's y)       Liu et al. 2024, arXiv:2402.09353; the length by outputs

A frozen matrix gets no gradient, and its input is not kept for one: a third of the work of a full gradient is not done.
What is stored in 16 or 4 bits is widened for one product at a time, so that it trains at the speed of the type that
products are computed in, whatever the processor does with 16 bits.

Shape suffixes: N rows, I inputs, O outputs, R rank, J groups of inputs, H half a group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..llama.quantize import RoundedLinear

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat's 16 numbers (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""
_NF4_GROUP = 64


class NF4Linear(RoundedLinear):
    """Weights (O, J, H) uint8, each two indices into ``NF4_LEVELS``, the first in the high bits.

    Scales (O, J, 1) float32: the largest size in each 64 inputs of an output; they are not rounded a second time. What
    fills no group is followed by zeros.
    """

    kind = "nf4"

    def __init__(self, inputs: int, outputs: int, *, device: torch.device | str) -> None:
        groups = -(-inputs // _NF4_GROUP)
        weight = torch.empty(outputs, groups, _NF4_GROUP // 2, dtype=torch.uint8, device=device)
        super().__init__(inputs, outputs, weight=weight, scale=torch.empty(outputs, groups, 1, device=device))

    def dense(self, dtype: torch.dtype) -> Tensor:
        levels = torch.tensor(NF4_LEVELS, device=self.weight.device)
        pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=-1)  # what each byte stands for
        groups_OJI = F.embedding(self.weight.int(), pairs).flatten(2).mul_(self.scale)
        return groups_OJI.flatten(1)[:, : self.inputs].to(dtype)

    @staticmethod
    def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        groups_OJI = F.pad(weight_OI, (0, -weight_OI.shape[1] % _NF4_GROUP)).view(len(weight_OI), -1, _NF4_GROUP)
        scale_OJ1 = groups_OJI.abs().amax(-1, keepdim=True)
        levels = torch.tensor(NF4_LEVELS, device=weight_OI.device)
        between = (levels[1:] + levels[:-1]) / 2
        indices = torch.bucketize(groups_OJI / torch.where(scale_OJ1 == 0, 1.0, scale_OJ1), between).to(torch.uint8)
        return indices[..., ::2] << 4 | indices[..., 1::2], scale_OJ1


class FrozenLinear(nn.Module):
    """Stands for an ``nn.Linear`` without bias whose weight does not change: (..., I) in, (..., O) out."""

    def __init__(self, matrix: nn.Linear | NF4Linear) -> None:
        super().__init__()
        self.matrix = matrix.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return _product(self.matrix, x, None, None, 1.0)


class AdaptedLinear(nn.Module):
    """A frozen matrix with an adapter, which at first adds nothing."""

    def __init__(
        self,
        matrix: nn.Linear | NF4Linear,
        rank: int,
        scale: float,
        *,
        has_magnitude: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.matrix = matrix.requires_grad_(False)
        self.scale = scale
        inputs, outputs = sizes(matrix)
        device = matrix.weight.device
        # On the CPU, so that the same seed gives the same adapter on any device.
        down_RI = torch.empty(rank, inputs)
        nn.init.kaiming_uniform_(down_RI, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down_RI.to(device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.magnitude: nn.Parameter | None = None
        if has_magnitude:
            self.magnitude = nn.Parameter(dense(matrix, torch.float32).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        y = _product(self.matrix, x, self.down, self.up, self.scale)
        return y if self.magnitude is None else y * self._stretch().to(y.dtype)

    def effective(self) -> Tensor:
        """Return (O, I) float32 what the matrix and its adapter come to; gradients flow to the adapter."""
        weight_OI = torch.addmm(dense(self.matrix, torch.float32), self.up, self.down, alpha=self.scale)
        return weight_OI if self.magnitude is None else weight_OI * self._stretch()[:, None]

    def _stretch(self) -> Tensor:
        assert self.magnitude is not None
        with torch.no_grad(), torch.autocast(self.up.device.type, enabled=False):
            # A constant to the gradient (section 4.3 of the paper).
            length_O = torch.addmm(dense(self.matrix, torch.float32), self.up, self.down, alpha=self.scale).norm(dim=1)
        stretch_O: Tensor = self.magnitude / length_O
        return stretch_O


def dense(matrix: nn.Linear | NF4Linear, dtype: torch.dtype) -> Tensor:
    """Return (O, I) a matrix's weight in ``dtype``: itself where it is of that."""
    return matrix.dense(dtype) if isinstance(matrix, NF4Linear) else matrix.weight.to(dtype)


def sizes(matrix: nn.Linear | NF4Linear) -> tuple[int, int]:
    """Inputs and outputs."""
    return (
        (matrix.inputs, matrix.outputs) if isinstance(matrix, NF4Linear) else (matrix.in_features, matrix.out_features)
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """What products with ``x`` are computed in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _product(
    matrix: nn.Linear | NF4Linear, x: Tensor, down_RI: Tensor | None, up_OR: Tensor | None, scale: float
) -> Tensor:
    dtype = product_dtype(x)
    halves = [None if half is None else half.to(dtype) for half in (down_RI, up_OR)]
    rows_NI = x.to(dtype).flatten(0, -2)
    y_NO: Tensor = _Product.apply(rows_NI, matrix, *halves, scale)  # type: ignore[no-untyped-call]
    return y_NO.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """W x + scale up (down x), with both sums made inside the matrix products."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        matrix: nn.Linear | NF4Linear,
        down_RI: Tensor | None,
        up_OR: Tensor | None,
        scale: float,
    ) -> Tensor:
        with torch.autocast(x_NI.device.type, enabled=False):
            y_NO = F.linear(x_NI, dense(matrix, x_NI.dtype))
            if down_RI is None or up_OR is None:
                ctx.save_for_backward(None, None, None, None)
            else:
                low_NR = F.linear(x_NI, down_RI)
                y_NO.addmm_(low_NR, up_OR.T, alpha=scale)
                ctx.save_for_backward(x_NI, low_NR, down_RI, up_OR)
        ctx.matrix, ctx.scale = matrix, scale
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NO,) = gradients
        x_NI, low_NR, down_RI, up_OR = ctx.saved_tensors
        to_x_NI = None
        with torch.autocast(gradient_NO.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                to_x_NI = gradient_NO @ dense(ctx.matrix, gradient_NO.dtype)
            if down_RI is None:
                return to_x_NI, None, None, None, None
            to_low_NR = (gradient_NO @ up_OR).mul_(ctx.scale)
            if to_x_NI is not None:
                to_x_NI.addmm_(to_low_NR, down_RI)
            return to_x_NI, None, to_low_NR.T @ x_NI, (gradient_NO.T @ low_NR).mul_(ctx.scale), None
