"""Picking tokens: each strategy keeps the tokens it should, with the probabilities it should."""

from __future__ import annotations

import math
from collections import Counter
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_stack_meta_reference.inference.logits import ALTERNATIVES, sample
from llama_stack_meta_reference.inference.sampler import Sampler
from torch import Tensor

from llama_stack.apis.common import SamplingParams, SamplingStrategy

LOGITS_V = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def sampler(strategy: str = "top_p", **numbers: float | int) -> Sampler:
    return Sampler(SamplingParams.model_validate({"strategy": SamplingStrategy(strategy), **numbers}))


def draws(logits_V: Tensor, how: Sampler, count: int) -> Counter[int]:
    """How often each token is picked in ``count`` draws."""
    picked = sample(logits_V.expand(count, -1), [how.choose() for _ in range(count)])
    return Counter(token.token for token in picked if token is not None)


def expected(logits_V: Tensor, temperature: float, kept: list[int]) -> dict[int, float]:
    probability_V = (logits_V.double() / temperature).softmax(0)
    total = sum(probability_V[token].item() for token in kept)
    return {token: probability_V[token].item() / total for token in kept}


def check_frequencies(found: Counter[int], wanted: dict[int, float]) -> None:
    """Within 5 standard deviations each: a right sampler fails a test of five tokens once in 350,000 seeds."""
    count = sum(found.values())
    assert set(found) <= set(wanted)
    for token, probability in wanted.items():
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(found[token] - count * probability) <= 5 * deviation + 1e-9, (token, found, wanted)


@pytest.mark.parametrize(
    "how", [sampler("greedy", temperature=1.0, top_k=3, top_p=0.5), sampler("top_p"), sampler("top_k", top_k=3)]
)
def test_greedy_and_temperature_zero_pick_the_likeliest_whatever_else_is_said(how: Sampler) -> None:
    """Spec rule G12: greedy ignores the numbers, and the draft's default temperature of 0 means greedy."""
    assert draws(LOGITS_V, how, 20) == {1: 20}


@pytest.mark.parametrize(
    ("how", "temperature", "kept"),
    [
        (sampler("top_p", temperature=1.0, top_p=1.0, seed=1), 1.0, [0, 1, 2, 3, 4]),
        (sampler("top_p", temperature=1.0, top_p=0.75, seed=2), 1.0, [1, 3]),
        (sampler("top_p", temperature=1.0, top_p=0.0, seed=3), 1.0, [1]),
        (sampler("top_p", temperature=3.0, top_p=0.8, seed=4), 3.0, [0, 1, 3, 4]),
        (sampler("top_k", temperature=1.0, top_k=3, seed=5), 1.0, [0, 1, 3]),
        (sampler("top_k", temperature=0.5, top_k=0, seed=6), 0.5, [0, 1, 2, 3, 4]),
        (sampler("top_k", temperature=1.0, top_k=1_000_000, seed=7), 1.0, [0, 1, 2, 3, 4]),
        (sampler("top_k", temperature=1.0, top_k=2, top_p=0.0, seed=8), 1.0, [1, 3]),
        (sampler("top_p", temperature=1.0, top_p=1.0, top_k=1, seed=9), 1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_tokens_come_as_often_as_the_cut_distribution_says(how: Sampler, temperature: float, kept: list[int]) -> None:
    """A strategy keeps its own tokens, at their own odds, and ignores the other strategy's number."""
    check_frequencies(draws(LOGITS_V, how, 20_000), expected(LOGITS_V, temperature, kept))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7), min_size=1, max_size=5),
    temperature=st.sampled_from([1e-320, 1e-9, 0.3, 1.0, 100.0]),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 9),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_seed_picks_the_same_alone_and_in_any_batch(
    rows: list[list[float]], temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    """Who else is served must not change an answer that a client asked to be repeatable."""
    logits_RV = torch.tensor(rows)

    def samplers() -> list[Sampler]:
        kinds = [("top_p", top_p, 0), ("top_k", 1.0, top_k), ("greedy", 1.0, 0)]
        return [
            sampler(kind, temperature=temperature, top_p=p, top_k=k, seed=(seed + row) % 2**63)
            for row, (kind, p, k) in zip(range(len(rows)), cycle(kinds), strict=False)
        ]

    together = sample(logits_RV, [how.choose() for how in samplers()])
    alone = [sample(logits_RV[row : row + 1], [how.choose()])[0] for row, how in enumerate(samplers())]
    assert together == alone
    assert all(picked is not None and 0 <= picked.token < 7 for picked in together)


def test_without_a_seed_two_sequences_differ() -> None:
    """Fresh entropy each: 64 picks among 1,000 equal tokens agree by chance once in 10^192."""
    flat_V = torch.zeros(1000)
    first, second = (sampler(temperature=1.0, top_p=1.0) for _ in range(2))
    assert [*draws(flat_V, first, 64).elements()] != [*draws(flat_V, second, 64).elements()]


def test_a_row_that_is_not_finite_is_told_apart_and_harms_no_other() -> None:
    """One broken sequence must fail alone, also beside others that sample."""
    logits_RV = torch.stack([LOGITS_V, LOGITS_V.clone(), LOGITS_V, LOGITS_V.clone()])
    logits_RV[1, 2] = math.nan
    logits_RV[3, 0] = math.inf
    seeded = [sampler(temperature=1.0, top_p=1.0, seed=7) for _ in range(4)]
    picked = sample(logits_RV, [how.choose(wants_logprobs=True) for how in seeded])
    assert picked[1] is None
    assert picked[3] is None
    assert picked[0] == picked[2]
    assert picked[0] is not None


def test_a_token_of_no_probability_is_never_picked() -> None:
    """A logit of minus infinity is a ban, and the largest random number must not reach past the last allowed token."""
    banned_V = torch.tensor([-math.inf, 1.0, 1.0, -math.inf])
    how = sampler(temperature=1.0, top_p=1.0, seed=11)
    assert set(draws(banned_V, how, 200)) == {1, 2}
    largest = how.choose()._replace(drawn=math.nextafter(1.0, 0.0))
    (picked,) = sample(banned_V[None], [largest])
    assert picked is not None
    assert picked.token in {1, 2}


def test_logprobs_are_the_models_own_and_come_only_where_asked() -> None:
    """Clients compare them between requests, so temperature and cuts must not show in them."""
    logits_RV = torch.stack([LOGITS_V, LOGITS_V])
    how = [sampler("top_k", temperature=5.0, top_k=1, seed=1), sampler("greedy")]
    scored, plain = sample(logits_RV, [how[0].choose(wants_logprobs=True), how[1].choose()])
    assert scored is not None
    assert plain is not None
    own_V = LOGITS_V.log_softmax(0)
    assert scored.token == 1
    assert scored.logprob == pytest.approx(own_V[1].item(), abs=1e-6)
    assert [token for token, _ in scored.alternatives] == [1, 3, 0, 4, 2][:ALTERNATIVES]
    assert dict(scored.alternatives)[2] == pytest.approx(own_V[2].item(), abs=1e-6)
    assert plain.logprob is None
    assert plain.alternatives == ()
