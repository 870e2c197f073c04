"""How one sequence wants its tokens picked, with its own source of randomness. Numbers only: logits.py picks.

Randomness is one number a token, drawn by the sequence's own generator. So a seed gives the same tokens wherever the
network runs and whatever else is in the batch, up to the rounding of the logits themselves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from llama_stack.apis.common import SamplingParams, SamplingStrategy

_LEAST_TEMPERATURE = 1e-6
"""Below this float32 would divide zero by zero; the likeliest token is all but certain long before."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token that was picked, with log-probabilities when they were asked for."""

    token: int
    logprob: float | None = None
    """Natural logarithm of the probability that the model itself gives it, before temperature, top-k and top-p."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, best first, with theirs."""


class Choice(NamedTuple):
    """How one token is to be picked; chance has been drawn already, so the same choice picks the same token."""

    is_greedy: bool = True
    """The likeliest token; all numbers below are ignored."""
    wants_logprobs: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """Among the k likeliest; 0 = among all."""
    top_p: float = 1.0
    """Among the fewest whose probabilities reach p."""
    drawn: float = 0.0
    """A random number from [0, 1)."""


_GREEDY = (Choice(), Choice(wants_logprobs=True))


class Sampler:
    """How one sequence picks its tokens, and its own source of randomness.

    ``greedy`` ignores all numbers, and a temperature of 0 is greedy under every strategy. ``top_k`` picks among the k
    likeliest tokens and ``top_p`` among the fewest whose probabilities reach p (Holtzman et al. 2020,
    arXiv:1904.09751); each strategy ignores the other's number.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.is_greedy = params.strategy is SamplingStrategy.GREEDY or params.temperature == 0
        self._temperature = max(params.temperature, _LEAST_TEMPERATURE)
        self._top_k = params.top_k if params.strategy is SamplingStrategy.TOP_K else 0
        self._top_p = params.top_p if params.strategy is SamplingStrategy.TOP_P else 1.0
        self._seed = params.seed

    def choose(self, *, wants_logprobs: bool = False) -> Choice:
        """How the next token is to be picked. Draws a random number, unless the sampler is greedy and needs none."""
        if self.is_greedy:
            return _GREEDY[wants_logprobs]
        return Choice(False, wants_logprobs, self._temperature, self._top_k, self._top_p, self._random.random())

    @cached_property
    def _random(self) -> random.Random:
        # Made when first used: its state is large, and thousands of a batch may wait.
        return random.Random(self._seed)  # without a seed: from the system's entropy
