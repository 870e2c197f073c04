"""Speculative decoding by look-up: the next tokens are guessed to be those that followed the same words before.

Answers often repeat their prompt: quotations, code that is edited, names, and lists. Such a guess costs no second
network, and the tokens of a guess are run together in one step, which for one sequence takes hardly longer than a
single token. What the network itself would have picked decides how many of them stand, so a greedy answer is the same
with and without (Yang et al. 2023, LLMA, arXiv:2304.04487; Saxena 2023, prompt lookup decoding).

A network that drafts for another one would be a second ``Drafter``.
"""

from __future__ import annotations

from typing import Protocol

NGRAM = 3
"""How many tokens must have occurred before: with 2 most guesses are wrong, with more the short repeats are missed."""
_FIRST_GUESS = 4
_LONGEST_PAUSE = 64
_INDEXED_AT_ONCE = 4096
"""A prompt of 100,000 tokens takes 1.5 ms a step for a while, instead of 40 ms in one."""


class Drafter(Protocol):
    """Guesses how one sequence goes on."""

    def propose(self, tokens: list[int], max_tokens: int) -> list[int]:
        """Return at most ``max_tokens`` tokens that may follow; often none. ``tokens`` grows from call to call."""
        ...

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the tokens proposed last were what the network picked."""
        ...


class PromptLookup:
    """Looks the last ``NGRAM`` tokens up in all that the sequence holds so far, and proposes what followed.

    How much it proposes follows from how the last proposals went: twice as much after one that was right to its end,
    and after one that was all wrong nothing for a while, longer each time. So text that does not repeat itself costs a
    wrong token now and then, and each step a look into a dictionary.
    """

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram to the place after its latest occurrence
        self._indexed = NGRAM
        self._size = _FIRST_GUESS
        self._pause = 0
        self._next_pause = 1

    def propose(self, tokens: list[int], max_tokens: int) -> list[int]:
        """See ``Drafter``. A guess that reaches the end of the text goes on with itself, as a repetition does."""
        if self._pause:
            self._pause -= 1
            return []
        self._index(tokens)
        place = self._followers.get(tuple(tokens[-NGRAM:]))
        if place is None:
            return []
        period = len(tokens) - place
        return [tokens[place + step % period] for step in range(min(self._size, max_tokens))]

    def learn(self, proposed: int, accepted: int) -> None:
        """See ``Drafter``."""
        if accepted:
            self._size = 2 * proposed if accepted == proposed else accepted + 1
            self._next_pause = 1
        else:
            self._size = max(1, self._size // 2)
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)

    def _index(self, tokens: list[int]) -> None:
        """Enter the n-grams that have got a follower since the last call, of a long prompt a part at a time."""
        end = min(len(tokens), self._indexed + _INDEXED_AT_ONCE)
        if end <= self._indexed:
            return
        part = tokens[self._indexed - NGRAM : end - 1]
        ngrams = zip(*(part[offset:] for offset in range(NGRAM)), strict=False)
        self._followers.update(zip(ngrams, range(self._indexed, end), strict=True))
        self._indexed = end
