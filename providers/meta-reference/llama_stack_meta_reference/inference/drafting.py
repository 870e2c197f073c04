"""Speculative decoding: tokens are guessed ahead, and the network runs a whole guess in one step.

For one sequence that takes hardly longer than a single token. What the network itself would have picked decides how
much of a guess stands, so a greedy answer is the same with and without (Leviathan et al. 2022, arXiv:2211.17192).

Guesses come from what followed the same words before, at no cost (Yang et al. 2023, LLMA, arXiv:2304.04487; Saxena
2023, prompt lookup decoding): answers often repeat their prompt, in quotations, code that is edited, names and lists.
Where there is a draft network, a small one beside the model, it guesses the rest (draft_network.py).
"""

from __future__ import annotations

from typing import Protocol

GUESS = -1
"""Stands for a token that the draft network is to guess."""
NGRAMS = (12, 6, 3)
"""How many tokens must have occurred before; the longest that have count. After 3 a text often goes on in several ways,
and the latest of them is wrong where another place is being copied; with 2 most guesses are wrong."""
_FIRST_GUESS = 4
_LONGEST_PAUSE = 64
_INDEXED_AT_ONCE = 1024
"""A prompt of 100,000 tokens takes a millisecond a step for a while, instead of a tenth of a second in one."""


class Drafter(Protocol):
    """Guesses how one sequence goes on."""

    def propose(self, tokens: list[int], max_tokens: int) -> list[int]:
        """Return at most ``max_tokens`` tokens that may follow; often none. ``tokens`` grows from call to call.

        All of them may be ``GUESS``: then the draft network is to guess as many.
        """
        ...

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the tokens proposed last were what the network picked."""
        ...


class _Pace:
    """How much to guess, by how the last guesses went.

    Twice as much after one that was right to its end, and after one that was all wrong nothing for a while, longer each
    time. So a text that cannot be guessed costs a wrong token now and then.
    """

    def __init__(self) -> None:
        self.size = _FIRST_GUESS
        self._pause = 0
        self._next_pause = 1

    def is_pausing(self) -> bool:
        """Whether to pass over this step."""
        if self._pause:
            self._pause -= 1
            return True
        return False

    def learn(self, proposed: int, accepted: int) -> None:
        """See ``Drafter``."""
        if accepted:
            self.size = 2 * proposed if accepted == proposed else accepted + 1
            self._next_pause = 1
        else:
            self.size = max(1, self.size // 2)
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)


class PromptLookup:
    """Looks the last tokens, as many as occurred before, up in all that the sequence holds; proposes what followed.

    Never more than ``most`` tokens.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        # For each length, an n-gram's hash to the place after its latest occurrence. Equal hashes of unequal ones would
        # be a wrong guess and no more; the n-grams themselves would take more memory.
        self._followers: dict[int, dict[int, int]] = {length: {} for length in NGRAMS}
        self._indexed = min(NGRAMS)
        self._pace = _Pace()

    def propose(self, tokens: list[int], max_tokens: int) -> list[int]:
        """See ``Drafter``. A guess that reaches the end of the text goes on with itself, as a repetition does."""
        if self._pace.is_pausing():
            return []
        self._index(tokens)
        found = (places.get(hash(tuple(tokens[-length:]))) for length, places in self._followers.items())
        place = next((place for place in found if place is not None), None)
        if place is None:
            return []
        period = len(tokens) - place
        return [tokens[place + step % period] for step in range(min(self._pace.size, self._most, max_tokens))]

    def learn(self, proposed: int, accepted: int) -> None:
        """See ``Drafter``."""
        self._pace.learn(proposed, accepted)

    def _index(self, tokens: list[int]) -> None:
        """Enter the n-grams that have got a follower since the last call, of a long prompt a part at a time."""
        end = min(len(tokens), self._indexed + _INDEXED_AT_ONCE)
        if end <= self._indexed:
            return
        for length, places in self._followers.items():
            begin = max(self._indexed, length)
            part = tokens[begin - length : end - 1]
            ngrams = zip(*(part[offset:] for offset in range(length)), strict=False)
            places.update(zip(map(hash, ngrams), range(begin, end), strict=True))
        self._indexed = end


class NetworkGuesses:
    """Leaves it to the draft network to guess up to ``most`` tokens where ``first``, if given, has nothing to say."""

    def __init__(self, most: int, first: Drafter | None) -> None:
        self._most = most
        self._first = first
        self._is_first = False
        self._pace = _Pace()

    def propose(self, tokens: list[int], max_tokens: int) -> list[int]:
        """See ``Drafter``."""
        proposed = self._first.propose(tokens, max_tokens) if self._first else []
        self._is_first = bool(proposed)
        if proposed or self._pace.is_pausing():
            return proposed
        return [GUESS] * min(self._pace.size, self._most, max_tokens)

    def learn(self, proposed: int, accepted: int) -> None:
        """See ``Drafter``."""
        if self._is_first and self._first:
            self._first.learn(proposed, accepted)
        else:
            self._pace.learn(proposed, accepted)
