"""From logits to tokens: greedy, or at random after temperature, top-k or top-p.

Which token a random number stands for is found by inverting the cumulative distribution, so that the number, drawn by
the sequence itself (sampler.py), decides alone.

Shape suffixes: R rows that are sampled, V vocabulary, A alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sampler import Choice, SampledToken

ALTERNATIVES = 5
"""How many of the likeliest tokens ``top_logprobs`` lists beside the chosen one."""


def sample(logits_RV: Tensor, choices: Sequence[Choice]) -> list[SampledToken | None]:
    """Pick one token a row of float32 logits, as its choice says; None for a row whose logits are not finite.

    All work is done on the logits' device, and the results of all rows come back in one transfer.
    """
    greedy_R = likeliest(logits_RV)
    highest_R = logits_RV.gather(1, greedy_R[:, None])[:, 0]
    token_R = greedy_R
    if not all(choice.is_greedy for choice in choices):
        sampled_R = _sample_random(logits_RV, choices)
        is_greedy_R = torch.tensor([choice.is_greedy for choice in choices], device=logits_RV.device)
        token_R = torch.where(is_greedy_R, greedy_R, sampled_R)
    # One float64 table holds everything: token ids are far below 2**53.
    columns = [token_R[:, None].double(), highest_R.isfinite()[:, None].double()]
    if any(choice.wants_logprobs for choice in choices):
        logprob_RV = logits_RV.log_softmax(dim=-1)
        best_RA, best_token_RA = logprob_RV.topk(min(ALTERNATIVES, logits_RV.shape[-1]), dim=-1)
        columns += [logprob_RV.gather(1, token_R[:, None]).double(), best_token_RA.double(), best_RA.double()]
    picked: list[SampledToken | None] = []
    for row, (token, is_finite, *scores) in enumerate(torch.cat(columns, dim=1).tolist()):
        if not is_finite:
            picked.append(None)
        elif choices[row].wants_logprobs:
            count = len(scores) // 2
            best = zip(map(int, scores[1 : 1 + count]), scores[1 + count :], strict=True)
            picked.append(SampledToken(int(token), scores[0], tuple(best)))
        else:
            picked.append(SampledToken(int(token)))
    return picked


def likeliest(logits_RV: Tensor) -> Tensor:
    """Return (R,) the place of the largest logit, or of one that is not a number, the first of equals."""
    if logits_RV.device.type == "cpu":
        # numpy uses the CPU's vector instructions here and torch does not: 13 times faster at 32 rows of 128,000.
        return torch.from_numpy(logits_RV.numpy().argmax(axis=-1))
    return logits_RV.argmax(dim=-1)


def _sample_random(logits_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Return (R,) tokens picked at random; the rows of greedy choices hold anything."""
    vocabulary = logits_RV.shape[-1]
    numbers = [(c.temperature, min(c.top_k or vocabulary, vocabulary), c.top_p, c.drawn) for c in choices]
    temperature_R1, top_k_R1, top_p_R1, drawn_R1 = torch.tensor(
        numbers, dtype=torch.float64, device=logits_RV.device
    ).T[..., None]
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    # The largest logit becomes 0 first: divided by a tiny temperature it would overflow. Sums of 100,000 probabilities
    # need float64.
    weight_RV = ((sorted_RV - sorted_RV[:, :1]).double() / temperature_R1).exp()
    rank_V = torch.arange(vocabulary, device=logits_RV.device)
    weight_RV = weight_RV.masked_fill(rank_V >= top_k_R1, 0.0)
    before_RV = weight_RV.cumsum(-1) - weight_RV
    total_R1 = weight_RV.sum(-1, keepdim=True)
    # A token stays while those before it have not reached p; the first one always stays.
    is_kept_RV = (before_RV < top_p_R1 * total_R1) | (rank_V == 0)
    weight_RV = weight_RV.masked_fill(~is_kept_RV, 0.0)
    cumulative_RV = weight_RV.cumsum(-1)
    index_R1 = torch.searchsorted(cumulative_RV, drawn_R1 * cumulative_RV[:, -1:], right=True)
    last_R1 = (weight_RV > 0).sum(-1, keepdim=True) - 1
    return order_RV.gather(1, index_R1.minimum(last_R1).clamp(min=0))[:, 0]
