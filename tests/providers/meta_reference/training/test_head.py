"""Log-probabilities of labels without all logits at once: the same numbers and the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llama_stack_meta_reference.training import head
from torch import Tensor


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of several portions, the last of which is not full."""
    monkeypatch.setattr(head, "_LOGITS_AT_ONCE", 50 * 7)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(31, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    return states, weight, torch.randint(0, 50, (31,), generator=generator)


@pytest.mark.parametrize("is_summed", [True, False])
@pytest.mark.parametrize("is_weight_trained", [True, False])
def test_gradients_are_those_of_cross_entropy(
    parts: tuple[Tensor, Tensor, Tensor], is_summed: bool, is_weight_trained: bool
) -> None:
    """Each row counts differently, as preferences have it; what is summed counts all alike."""
    states, weight, labels = parts
    weight.requires_grad_(is_weight_trained)
    counts = torch.full((31,), 2.5) if is_summed else torch.linspace(-1, 3, 31)
    plain = (-F.cross_entropy(F.linear(states, weight).float(), labels, reduction="none") * counts).sum()
    wanted = [states] + [weight] * is_weight_trained
    expected = torch.autograd.grad(plain, wanted)
    if is_summed:
        found = head.summed_log_prob(states, weight, labels) * 2.5
    else:
        found = (head.label_log_probs(states, weight, labels) * counts).sum()
    assert torch.allclose(found, plain, rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, wanted), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_no_labels_are_no_loss() -> None:
    states = torch.randn(0, 16, requires_grad=True)
    total = head.summed_log_prob(states, torch.randn(50, 16), torch.zeros(0, dtype=torch.int64))
    total.backward()  # type: ignore[no-untyped-call]
    assert total == 0
