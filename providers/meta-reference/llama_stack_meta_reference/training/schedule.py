"""What each iteration takes: rows, and a learning rate. Both follow from settings and the iteration's number alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import OptimizerSettings, TrainingSettings

_WARM_UP_SHARE = 0.03


@dataclass(frozen=True)
class Schedule:
    """Which rows each iteration takes, and how many there are."""

    rows: int
    settings: TrainingSettings
    seed: int

    @property
    def epoch_iters(self) -> int:
        return math.ceil(self.rows / self.settings.batch_size)

    @property
    def total_iters(self) -> int:
        limits = (self.settings.n_epochs * self.epoch_iters, self.settings.n_iters)
        return min(limit for limit in limits if limit)

    def batch(self, iteration: int) -> list[int]:
        """The numbers of the rows of an iteration, from 0."""
        epoch, place = divmod(iteration, self.epoch_iters)
        first = place * self.settings.batch_size
        if not self.settings.is_shuffled:
            return list(range(first, min(first + self.settings.batch_size, self.rows)))
        return self._order(epoch)[first : first + self.settings.batch_size].tolist()

    def _order(self, epoch: int) -> Tensor:
        kept: tuple[int, Tensor] | None = self.__dict__.get("_kept")
        if kept is None or kept[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            kept = self.__dict__["_kept"] = (epoch, torch.randperm(self.rows, generator=generator))
        return kept[1]


def learning_rate(settings: OptimizerSettings, iteration: int, total_iters: int) -> float:
    """The rate of an iteration, from 0: a straight climb to ``lr``, then half a cosine to ``lr_min``
    (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    warm_up = settings.warmup_iters
    if warm_up is None:
        warm_up = math.ceil(_WARM_UP_SHARE * total_iters)
    if iteration < warm_up:
        return settings.lr * (iteration + 1) / (warm_up + 1)
    share = (iteration - warm_up) / max(1, total_iters - warm_up)
    return settings.lr_min + (settings.lr - settings.lr_min) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
