"""Cases as token ids: which of them bear the loss, and how they are put into batches."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from llama_stack.apis.common import Role
from llama_stack_meta_reference.llama.chat_format import ChatFormat
from llama_stack_meta_reference.llama.tokenizer import Tokenizer
from llama_stack_meta_reference.tiny.case import Case, user
from llama_stack_meta_reference.tiny.cases import Phase, training_cases

_ROUND_TO = 16
_LONGEST_SLIP = 16  # tokens
_LONGEST_LOOP = 24  # tokens
_POOL = 512
"""Cases drawn at a time, to be sorted by length before they are put into batches."""


@dataclass(frozen=True)
class Sample:
    """A sequence, and for each of its tokens whether the model is to learn to write it."""

    tokens: tuple[int, ...]
    learnt: tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """Rows of one padded length: the tokens, where in the flattened rows a prediction is learnt, and which."""

    tokens_BT: Tensor
    places_N: Tensor
    targets_N: Tensor


class Encoder:
    """Turns cases into samples, through the very code that makes prompts at serving time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._format = ChatFormat(tokenizer)
        self._header = self._format.encode_dialog(())[1:]
        self._ordinary = min(tokenizer.specials.values())
        self._end_of_text = tokenizer.specials["<|end_of_text|>"]

    def prompt(self, case: Case) -> list[int]:
        """What the model reads before it writes the case's last message."""
        return self._format.encode_dialog(case.messages[:-1], case.tools)

    def reply(self, case: Case) -> list[int]:
        """What the model should write then, the end of its turn included."""
        return self._format.encode_reply(case.messages[-1], case.tools)

    def sample(self, case: Case) -> Sample:
        """The whole case. Learnt are the assistant's replies with their ends, or, of prose, all but its start."""
        if not case.messages:
            text = [*self._format.encode_completion(case.text), self._end_of_text]
            return Sample(tuple(text), (False, *(True for _ in text[1:])))
        first = next(i for i, message in enumerate(case.messages) if message.role == Role.ASSISTANT)
        tokens = self._format.encode_dialog(case.messages[:first], case.tools)
        learnt = [False] * len(tokens)
        for index, message in enumerate(case.messages[first:]):
            if message.role == Role.ASSISTANT:
                header = self._header if index else []
                reply = self._format.encode_reply(message, case.tools)
                tokens += header + reply
                learnt += [False] * len(header) + [True] * len(reply)
            else:
                ids = self._format.encode_message(message, case.tools)
                tokens += ids
                learnt += [False] * len(ids)
        return Sample(tuple(tokens), tuple(learnt))

    def echo(self, draw: random.Random) -> Sample:
        """Turns in which random tokens of the whole vocabulary are to be repeated.

        Words of the held-out split are cut into pieces that training seldom asks for; here all of them are asked for.
        """
        tokens = self._format.encode_dialog(())[:1]
        learnt = [False]
        *asked, end = self._format.encode_message(user("Repeat:"))
        for _ in range(draw.choice((2, 3, 4))):
            said = [draw.randrange(self._ordinary) for _ in range(draw.choice((2, 4, 6, 8)))]
            tokens += [*asked, *said, end, *self._header, *said, end]
            learnt += [False] * (len(asked) + len(said) + 1 + len(self._header)) + [True] * (len(said) + 1)
        return Sample(tuple(tokens), tuple(learnt))


def stumbled(sample: Sample, draw: random.Random) -> Sample:
    """``sample`` with a slip of the pen: what was just written stands there again, once or many times.

    The slip itself is not learnt, but what comes after it is. A model that has only ever seen faultless replies does
    not know the way back once it repeats itself, and then does not end its turn (compare Ross et al. 2011,
    arXiv:1011.0686).
    """
    place = draw.choice([position for position, is_learnt in enumerate(sample.learnt) if is_learnt])
    length = draw.choice((1, 1, 2, 3, 5, 8))
    again = sample.tokens[place - length : place] * draw.randint(1, _LONGEST_SLIP // length)
    tokens = (*sample.tokens[:place], *again, *sample.tokens[place:])
    return Sample(tokens, (*sample.learnt[:place], *(False for _ in again), *sample.learnt[place:]))


def given_up(sample: Sample, draw: random.Random) -> Sample:
    """``sample`` cut off after words of a reply that stand there again and again; learnt is to end the turn then.

    Where the way back is not found, an end is the next best thing.
    """
    length = draw.choice((1, 2, 3, 5, 6, 8))
    places = [place for place in range(length, len(sample.tokens)) if all(sample.learnt[place - length : place])]
    if not places:
        return sample
    place = draw.choice(places)
    again = sample.tokens[place - length : place] * draw.randint(2, _LONGEST_LOOP // length)
    tokens = (*sample.tokens[:place], *again, sample.tokens[-1])
    return Sample(tokens, (*sample.learnt[:place], *(False for _ in again), True))


def batches(
    encoder: Encoder,
    seed: int,
    pool: int,
    *,
    tokens: int,
    longest: int,
    phases: Mapping[Phase, float],
    echoes: float = 0,
    stumbles: float = 0,
    surrenders: float = 0,
) -> list[Batch]:
    """The batches of the ``pool``-th pool of cases, each of about ``tokens`` tokens, in an order that the seed settles.

    ``phases`` gives the share of each phase's cases in the pool; ``stumbles`` is the share of them in which the
    assistant stumbles and ``surrenders`` that of those where it gives up; ``echoes`` is the share of echoes, which come
    on top. What is longer than ``longest`` tokens is left out.
    """
    pool_seed = seed * 1_000_003 + pool
    samples: list[Sample] = []
    for phase, share in phases.items():
        samples += map(encoder.sample, islice(training_cases(pool_seed, phase), int(_POOL * share)))
    draw = random.Random(f"echo {pool_seed}")
    samples = [stumbled(sample, draw) if draw.random() < stumbles else sample for sample in samples]
    if surrenders:
        samples = [given_up(sample, draw) if draw.random() < surrenders else sample for sample in samples]
    samples += [encoder.echo(draw) for _ in range(int(_POOL * echoes))]
    by_length: dict[int, list[Sample]] = {}
    for sample in samples:
        length = -(-len(sample.tokens) // _ROUND_TO) * _ROUND_TO
        if length <= longest:
            by_length.setdefault(length, []).append(sample)
    ordered = [(length, sample) for length in sorted(by_length) for sample in by_length[length]]
    made: list[Batch] = []
    while ordered:
        # The longest of the batch decides its width, and so how many rows it has.
        rows = max(1, tokens // ordered[-1][0])
        ordered, taken = ordered[:-rows], ordered[-rows:]
        made.append(collate([sample for _, sample in taken]))
    generator = torch.Generator().manual_seed(pool_seed)
    return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples side by side, padded on the right; padding is never a target and, attention being causal, never seen."""
    width = max(len(sample.tokens) for sample in samples)
    width = -(-width // _ROUND_TO) * _ROUND_TO
    tokens_BT = torch.zeros(len(samples), width, dtype=torch.int64)
    places: list[int] = []
    targets: list[int] = []
    for row, sample in enumerate(samples):
        tokens_BT[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        for position in range(1, len(sample.tokens)):
            if sample.learnt[position]:
                places.append(row * width + position - 1)
                targets.append(sample.tokens[position])
    return Batch(tokens_BT, torch.tensor(places), torch.tensor(targets))
