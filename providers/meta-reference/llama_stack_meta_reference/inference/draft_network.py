"""A small network that guesses what a large one will pick, in the same steps (Leviathan et al. 2022, arXiv:2211.17192).

Its keys and values lie in blocks of the same numbers as the large one's and hold the same texts: whatever the large one
reads it reads too. So all that the scheduler does with blocks, sharing, reuse, preemption, is right for both, and it
needs no books of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .batch import Batch
from .drafting import GUESS
from .logits import likeliest
from .runner import Runner


@dataclass(frozen=True, slots=True)
class _Guess:
    """What is to be guessed of one sequence."""

    first: int
    """The place in the batch of its last known token, after which the guessed ones stand."""
    count: int
    start: int
    table: list[int]


class DraftNetwork:
    """Fills in the guesses of a step: of its tokens the first ``vocabulary``, which are the large one's too."""

    def __init__(self, runner: Runner, vocabulary: int) -> None:
        self._runner = runner
        self._vocabulary = vocabulary

    def run(self, batch: Batch) -> None:
        """Write a token into each place of ``batch.tokens`` that holds ``GUESS``, and read what is new in the batch."""
        guesses = list(_guesses(batch))
        for place in range(max((guess.count for guess in guesses), default=0)):
            going = [guess for guess in guesses if guess.count > place]
            logits_RV = self._runner.run(
                Batch(
                    [batch.tokens[guess.first + place] for guess in going],
                    [guess.start + place for guess in going],
                    [1] * len(going),
                    [guess.table for guess in going],
                    list(range(len(going))),
                )
            )
            for guess, token in zip(going, likeliest(logits_RV[:, : self._vocabulary]).tolist(), strict=True):
                batch.tokens[guess.first + place + 1] = token
        self._runner.run(_unread(batch, {guess.first: guess.count for guess in guesses}))

    def reset(self) -> None:
        """Blank its cache."""
        self._runner.reset()

    def close(self) -> None:
        """Free its weights and cache."""
        self._runner.close()


def _guesses(batch: Batch) -> Iterator[_Guess]:
    first = 0
    for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
        if batch.tokens[first + count - 1] == GUESS:
            yield _Guess(first, count - 1, start, table)
        first += count


def _unread(batch: Batch, guessed: dict[int, int]) -> Batch:
    """The batch without what was read while guessing, which is all but the last token of each guess."""
    unread, first = Batch(), 0
    for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
        read = guessed.get(first, 0)
        unread.tokens += batch.tokens[first + read : first + count]
        unread.starts.append(start + read)
        unread.counts.append(count - read)
        unread.tables.append(table)
        first += count
    return unread
