"""Which words of a question count."""

from __future__ import annotations

import pytest
from llama_stack_memory.words import MAX_WORDS, fair_share, query_words


def test_words_that_say_nothing_are_left_out() -> None:
    """A question begins with them and its answer does not, so that each would pass for a rare word."""
    assert query_words("How do I stop the KX-204's pump?") == ["stop", "KX", "204", "pump"]


def test_a_question_of_nothing_else_keeps_them() -> None:
    """Somebody looks for a band, or quotes Hamlet."""
    assert query_words("to be or not to be") == ["to", "be", "or", "not"]
    assert query_words("?! ...") == []


def test_each_word_counts_once_and_not_more_than_so_many() -> None:
    """A page of text as a query must not become a thousand searches."""
    assert query_words("snow snow rain snow") == ["snow", "rain"]
    assert len(query_words(" ".join(f"w{n}" for n in range(1000)))) == MAX_WORDS


@pytest.mark.parametrize(("count", "share"), [(0, 0), (1, 1), (2, 1), (3, 2), (5, 2), (6, 3), (10, 4), (35, 14)])
def test_a_fair_share_is_two_fifths_rounded_up(count: int, share: int) -> None:
    """One word of two is enough, one of six is chance."""
    assert fair_share(["w"] * count) == share
