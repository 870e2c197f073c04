"""The draft's six filters, over the scores of the answers to one prompt (spec: settled readings, operation 24).

Each tells the places of what is kept, in the order of the answers. Equal scores count in that order, so that a result
never hangs on chance; what is drawn is drawn by the seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from llama_stack.apis.synthetic_data_generation import FilteringFunction


@dataclass(frozen=True)
class FilterSettings:
    """What the filters go by."""

    k: int
    p: float
    threshold: float | None
    """Answers below it are out before any filter looks at them."""


def kept(function: FilteringFunction, scores: Sequence[float], settings: FilterSettings, seed: str) -> list[int]:
    """The places of the answers that the filter keeps; ``seed`` is the request's, and the prompt's place in it."""
    above = [place for place, score in enumerate(scores) if settings.threshold is None or score >= settings.threshold]
    ranked = sorted(above, key=lambda place: -scores[place])
    match function:
        case FilteringFunction.NONE:
            return above
        case FilteringFunction.RANDOM:
            # no secret is drawn here, but what the same seed draws again
            return sorted(random.Random(seed).sample(above, math.ceil(len(above) / 2)))
        case FilteringFunction.TOP_K:
            return sorted(ranked[: settings.k])
        case FilteringFunction.TOP_P:
            return sorted(ranked[: _nucleus(ranked, scores, settings.p)])
        case FilteringFunction.TOP_K_TOP_P:
            return sorted(ranked[: min(settings.k, _nucleus(ranked, scores, settings.p))])
        case FilteringFunction.SIGMOID:
            draw = random.Random(seed)
            draws = [draw.random() for _ in scores]  # one for each answer, so that the threshold moves none of them
            return [place for place in above if draws[place] < _sigmoid(scores[place])]


def _nucleus(ranked: Sequence[int], scores: Sequence[float], p: float) -> int:
    """How many of the best make up the softmax mass ``p``, at the least."""
    if not ranked:
        return 0
    best = scores[ranked[0]]
    masses = [math.exp(scores[place] - best) for place in ranked]
    wanted = p * math.fsum(masses)
    reached = 0.0
    for count, mass in enumerate(masses, 1):
        reached += mass
        if reached >= wanted:
            return count
    return len(ranked)


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-max(score, -700.0)))  # beyond that exp overflows, and the draw never falls below it
