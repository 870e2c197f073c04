"""What a query asks of a store, settled before the store is asked: which rankings, and how they become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llama_stack.apis.filters import Condition

from .fusion import fuse
from .interfaces import Found, Vectors
from .words import ENOUGH

FUSED = 50
"""How many hits each ranking gives to a hybrid search, where it was not asked for more."""


@dataclass(frozen=True, slots=True)
class ByVector:
    """The ``k`` chunks that are most similar to a vector of length 1."""

    vector_D: Vectors
    k: int


@dataclass(frozen=True, slots=True)
class ByWords:
    """The ``k`` chunks that fit the words best by BM25; a chunk needs that share of them, and one at least."""

    words: Sequence[str]
    share: float
    k: int


@dataclass(frozen=True, slots=True)
class Listed:
    """The first ``k`` chunks of the bank, in the order of their coming, with a score of 0."""

    k: int


Ranking: TypeAlias = ByVector | ByWords | Listed


@dataclass(frozen=True, slots=True)
class Sought:
    """The best ``k`` of some rankings of the chunks whose documents meet a condition."""

    rankings: Sequence[Ranking]
    is_hybrid: bool
    k: int
    condition: Condition | None

    def joined(self, rankings: Sequence[Sequence[Found]]) -> list[Found]:
        """One ranking of what was found, given in the order of ``rankings``."""
        if self.is_hybrid:
            return fuse(rankings, self.k)
        return [found for ranking in rankings for found in ranking]


def sought(words: Sequence[str] | None, vector_D: Vectors | None, k: int, condition: Condition | None) -> Sought:
    """A search by words, by a vector or by both; with neither the chunks are listed. No words find nothing."""
    is_hybrid = words is not None and vector_D is not None
    wanted = max(k, FUSED) if is_hybrid else k
    rankings: list[Ranking] = []
    if vector_D is not None and vector_D.any():
        rankings.append(ByVector(vector_D, wanted))
    if words:
        rankings.append(ByWords(words, 0 if vector_D is None else ENOUGH, wanted))
    if words is None and vector_D is None:
        rankings.append(Listed(wanted))
    return Sought(rankings, is_hybrid, k, condition)
