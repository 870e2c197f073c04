"""The last step: from states to the log-probabilities of labels, a portion of the vocabulary-wide rows at a time.

A row of logits is as wide as the vocabulary, so all of them at once would be the largest thing in memory by far, and
reading and writing them the slowest. Here logits live for one portion: what their gradient says to the states is taken
before they go (as in Hsu et al. 2024, Liger Kernel, arXiv:2410.10989).

Shape suffixes as in llama/model.py, and: L labels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LOGITS_AT_ONCE = 1 << 23
"""Numbers: 32 MiB of float32, which still multiplies at full speed."""


def label_log_probs(states_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    """Return (L,) float32: the log-probability of each label. Computed in the dtype of the states."""
    log_probs_L: Tensor = _LogProbs.apply(states_LD, weight_VD, labels_L, False)  # type: ignore[no-untyped-call]
    return log_probs_L


def summed_log_prob(states_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    """Return the sum of ``label_log_probs``; the weight's gradient then costs no second look at the logits."""
    log_prob: Tensor = _LogProbs.apply(states_LD, weight_VD, labels_L, True)  # type: ignore[no-untyped-call]
    return log_prob


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, is_summed: bool) -> Tensor:
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        with torch.autocast(states_LD.device.type, enabled=False):
            kept_VD = weight_VD.to(states_LD.dtype)
            log_probs_L = torch.empty(len(labels_L), device=states_LD.device)
            to_states_LD = torch.empty_like(states_LD) if needs_states else None
            to_weight_VD = torch.zeros_like(kept_VD) if needs_weight and is_summed else None
            for some in _portions(len(labels_L), len(kept_VD)):
                slopes_LV = _slopes(states_LD[some], kept_VD, labels_L[some], log_probs_L[some])
                if to_states_LD is not None:
                    torch.mm(slopes_LV, kept_VD, out=to_states_LD[some])
                if to_weight_VD is not None:
                    to_weight_VD.addmm_(slopes_LV.T, states_LD[some])
        ctx.is_summed = is_summed
        again = (states_LD, weight_VD, labels_L) if needs_weight and not is_summed else (None, None, None)
        ctx.save_for_backward(to_states_LD, to_weight_VD, *again)
        ctx.weight_dtype = weight_VD.dtype
        return log_probs_L.sum() if is_summed else log_probs_L

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        to_states_LD, to_weight_VD, states_LD, weight_VD, labels_L = ctx.saved_tensors
        if ctx.is_summed:
            scaled = [None if part is None else part * gradient.to(part.dtype) for part in (to_states_LD, to_weight_VD)]
            return scaled[0], None if scaled[1] is None else scaled[1].to(ctx.weight_dtype), None, None
        if to_states_LD is not None:
            to_states_LD = to_states_LD * gradient[:, None].to(to_states_LD.dtype)
        if states_LD is None:
            return to_states_LD, None, None, None
        # How much each row counts is known only now, so what it says to the weight is worked out again.
        with torch.autocast(states_LD.device.type, enabled=False):
            kept_VD = weight_VD.to(states_LD.dtype)
            to_weight_VD = torch.zeros_like(kept_VD)
            ignored_L = torch.empty(len(labels_L), device=states_LD.device)
            for some in _portions(len(labels_L), len(kept_VD)):
                slopes_LV = _slopes(states_LD[some], kept_VD, labels_L[some], ignored_L[some])
                to_weight_VD.addmm_(slopes_LV.T, states_LD[some] * gradient[some, None].to(states_LD.dtype))
        return to_states_LD, to_weight_VD.to(ctx.weight_dtype), None, None


def _slopes(states_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, log_probs_L: Tensor) -> Tensor:
    """Fill in the log-probabilities of a portion; return (L, V) their slopes by each logit, in the states' dtype."""
    logs_LV = F.log_softmax(F.linear(states_LD, weight_VD).float(), dim=-1)
    log_probs_L.copy_(logs_LV.gather(1, labels_L[:, None])[:, 0])
    slopes_LV = logs_LV.exp_().neg_()
    slopes_LV.scatter_add_(1, labels_L[:, None], slopes_LV.new_ones(len(labels_L), 1))
    return slopes_LV.to(states_LD.dtype)


def _portions(rows: int, width: int) -> list[slice]:
    size = max(1, _LOGITS_AT_ONCE // width)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
