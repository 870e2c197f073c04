"""What is made small: the loss of each kind of training, over sequences that lie side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from llama_stack.errors import InvalidRequestError

from .network import Network
from .plan import PreferenceSettings
from .samples import Encoder, Packed, Sample


class Outcome(NamedTuple):
    """What a pass gave."""

    loss: Tensor
    """Summed, not averaged: over labels, or over pairs."""
    correct: Tensor | None = None
    """How many pairs have the chosen answer ahead."""


class Objective(ABC):
    """A kind of training."""

    has_accuracy = False

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @abstractmethod
    def encode(self, row: Mapping[str, Any]) -> tuple[Sample, ...]:
        """The samples of a row, which stay together. Raises ``InvalidRequestError``."""

    @abstractmethod
    def weight(self, groups: Sequence[Sequence[Sample]]) -> int:
        """What a batch's summed loss is divided by."""

    @abstractmethod
    def outcome(self, network: Network, packed: Packed, rows: Sequence[int]) -> Outcome:
        """The loss of the samples of ``rows``."""


class FineTuning(Objective):
    """Cross-entropy in nats, averaged over all labels of a batch."""

    def encode(self, row: Mapping[str, Any]) -> tuple[Sample, ...]:
        return self._encoder.fine_tuning(row)

    def weight(self, groups: Sequence[Sequence[Sample]]) -> int:
        # A first token has nothing before it that it could be predicted from.
        return max(1, sum(sum(sample.learnt[1:]) for group in groups for sample in group))

    def outcome(self, network: Network, packed: Packed, rows: Sequence[int]) -> Outcome:
        return Outcome(-network(packed, "sum"))


class Pairs(Objective):
    """Of two answers the chosen one should come out ahead; averaged over pairs."""

    has_accuracy = True

    def encode(self, row: Mapping[str, Any]) -> tuple[Sample, ...]:
        return self._encoder.preference(row)

    def weight(self, groups: Sequence[Sequence[Sample]]) -> int:
        return len(groups)


class Reward(Pairs):
    """The loss of Bradley and Terry on scores (Ouyang et al. 2022, arXiv:2203.02155, equation 1)."""

    def outcome(self, network: Network, packed: Packed, rows: Sequence[int]) -> Outcome:
        ahead_B = (lambda scores: scores[::2] - scores[1::2])(network(packed, "scores"))
        return Outcome(-F.logsigmoid(ahead_B).sum(), (ahead_B > 0).sum())


class Preference(Pairs):
    """Direct preference optimisation against log-probabilities that were kept."""

    def __init__(
        self, encoder: Encoder, settings: PreferenceSettings, reference: Callable[[Sequence[int]], Tensor]
    ) -> None:
        """``reference`` gives, (B, 2), what the first weights made of the chosen and rejected answers of rows."""
        super().__init__(encoder)
        self._settings, self._reference = settings, reference

    def encode(self, row: Mapping[str, Any]) -> tuple[Sample, ...]:
        samples = super().encode(row)
        if not all(any(sample.learnt) for sample in samples):
            raise InvalidRequestError(
                "the prompt alone is as long as a sequence may be; shorten it, or raise max_tokens"
            )
        return samples

    def outcome(self, network: Network, packed: Packed, rows: Sequence[int]) -> Outcome:
        log_probs_B2 = network(packed, "log_probs").view(-1, 2)
        reference_B2 = self._reference(rows).to(log_probs_B2.device)
        loss_B, ahead_B = preference_loss(log_probs_B2, reference_B2, self._settings)
        return Outcome(loss_B.sum(), (ahead_B > 0).sum())


def preference_loss(log_probs_B2: Tensor, reference_B2: Tensor, settings: PreferenceSettings) -> tuple[Tensor, Tensor]:
    """DPO's loss of each pair (Rafailov et al. 2023, arXiv:2305.18290, equation 7), and by how much the chosen answer
    is ahead, both (B,).

    The implicit reward of an answer is ``reward_scale`` x (log-probability - reference), at most ``reward_clip`` in
    size. ``gamma`` is taken off the difference (as in Meng et al. 2024, SimPO, arXiv:2405.14734); ``epsilon`` is
    conservative DPO's share of wrong labels.
    """
    rewards_B2 = settings.reward_scale * (log_probs_B2 - reference_B2)
    if settings.reward_clip:
        rewards_B2 = rewards_B2.clamp(-settings.reward_clip, settings.reward_clip)
    ahead_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    margin_B = ahead_B - settings.gamma
    loss_B = -(1 - settings.epsilon) * F.logsigmoid(margin_B) - settings.epsilon * F.logsigmoid(-margin_B)
    return loss_B, ahead_B
