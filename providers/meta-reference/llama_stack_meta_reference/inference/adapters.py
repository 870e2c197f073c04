"""LoRA adapters over a plain network: sequences with different ones, and with none, run through it in one step.

Each matrix that an adapter adds to gets a hook that adds, for the rows of each adapter in the step, its two small
products (Chen et al. 2023, Punica, arXiv:2310.18547, without its kernels). Of a split network each rank has its part,
of ``down`` where the inputs are split and of ``up`` where the outputs are.

Shape suffixes as in llama/lora.py, and N rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..llama.lora import LoraAdapter, Pair
from ..llama.model import Llama
from ..llama.parallel import Rank, is_split_by_inputs, sum_over_ranks
from .batch import Batch


class Adapters:
    """The adapters of one network. ``select`` before each step, with inference mode on."""

    def __init__(self, model: Llama, rank: Rank | None) -> None:
        self._model = model
        self._rank = rank
        self._held: dict[int, dict[str, Pair]] = {}
        self._rows: list[tuple[dict[str, Pair], Tensor]] = []
        self._hooks: dict[str, Any] = {}

    def add(self, number: int, adapter: LoraAdapter) -> None:
        """Hold an adapter under a number above 0, in the network's type and on its device."""
        weight = self._model.tok_embeddings.weight
        pairs = {}
        for name, pair in adapter.pairs.items():
            pair = pair if self._rank is None else _part(name, pair, self._rank)
            pairs[name] = Pair(*(half.to(weight.device, weight.dtype).contiguous() for half in pair))
            if name not in self._hooks:
                self._hooks[name] = self._model.get_submodule(name).register_forward_hook(self._hook(name))
        self._held[number] = pairs

    def remove(self, number: int) -> None:
        """Let go of an adapter; nothing happens if it is not there."""
        self._held.pop(number, None)
        needed = {name for pairs in self._held.values() for name in pairs}
        for name in self._hooks.keys() - needed:
            self._hooks.pop(name).remove()

    def select(self, batch: Batch) -> None:
        """Note which rows of the step run through which adapter. Raises ``KeyError`` for one that is not held."""
        places: dict[int, list[int]] = {}
        first = 0
        for number, count in zip(batch.adapters, batch.counts, strict=True) if any(batch.adapters) else ():
            if number:
                places.setdefault(number, []).extend(range(first, first + count))
            first += count
        device = self._model.tok_embeddings.weight.device
        self._rows = [(self._held[number], torch.tensor(rows).to(device)) for number, rows in places.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        # The sum over ranks is no part of what a row's adapter costs alone: all ranks come here for the same adapters.
        needs_sum = self._rank is not None and is_split_by_inputs(name)

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output_NO: Tensor) -> None:
            for pairs, rows_N in self._rows:
                if name in pairs:
                    down_RI, up_OR = pairs[name]
                    low_NR = F.linear(inputs[0][rows_N], down_RI)
                    output_NO.index_add_(0, rows_N, F.linear(sum_over_ranks(low_NR) if needs_sum else low_NR, up_OR))

        return add


def _part(name: str, pair: Pair, rank: Rank) -> Pair:
    if is_split_by_inputs(name):
        return Pair(pair.down_RI.chunk(rank.count, 1)[rank.number], pair.up_OR)
    return Pair(pair.down_RI, pair.up_OR.chunk(rank.count, 0)[rank.number])
