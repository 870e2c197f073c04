"""The losses of preferences, against their formulas written out in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from llama_stack_meta_reference.training.objectives import preference_loss
from llama_stack_meta_reference.training.plan import PreferenceSettings

# chosen, rejected; policy and reference
LOGS = torch.tensor([[-10.0, -12.5], [-30.25, -28.0], [-5.5, -5.5], [-100.0, -20.0]])
REFERENCE = torch.tensor([[-11.0, -12.0], [-31.0, -30.0], [-6.0, -5.0], [-50.0, -60.0]])


def by_hand(beta: float, epsilon: float, gamma: float) -> list[float]:
    """Equation 7 of arXiv:2305.18290 with label smoothing, in double precision."""
    losses = []
    for (chosen, rejected), (reference_chosen, reference_rejected) in zip(
        LOGS.double().tolist(), REFERENCE.double().tolist(), strict=True
    ):
        margin = beta * ((chosen - rejected) - (reference_chosen - reference_rejected)) - gamma
        losses.append((1 - epsilon) * math.log1p(math.exp(-margin)) + epsilon * math.log1p(math.exp(margin)))
    return losses


@pytest.mark.parametrize(("beta", "epsilon", "gamma"), [(0.1, 0.0, 0.0), (0.5, 0.2, 0.0), (0.1, 0.1, 0.3)])
def test_the_loss_is_that_of_the_paper(beta: float, epsilon: float, gamma: float) -> None:
    settings = PreferenceSettings(reward_scale=beta, epsilon=epsilon, gamma=gamma)
    loss, _ = preference_loss(LOGS, REFERENCE, settings)
    assert loss.tolist() == pytest.approx(by_hand(beta, epsilon, gamma), rel=1e-6, abs=1e-6)


def test_the_clip_bounds_each_reward() -> None:
    """The last pair's rewards are -5 and 4: both go to 1, and nothing more pulls at them."""
    logs = LOGS.clone().requires_grad_()
    loss, ahead = preference_loss(logs, REFERENCE, PreferenceSettings(reward_scale=0.1, reward_clip=1.0))
    assert ahead[-1].item() == pytest.approx(-2.0)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert logs.grad is not None
    assert logs.grad[-1].tolist() == [0.0, 0.0]
    assert logs.grad[0, 0] < 0 < logs.grad[0, 1]
