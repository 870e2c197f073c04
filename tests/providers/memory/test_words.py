"""Which words of a question count."""

from __future__ import annotations

from llama_stack_memory.words import MAX_WORDS, plain_words, query_words


def test_words_that_say_nothing_are_left_out() -> None:
    """A question begins with them and its answer does not, so that each would pass for a rare word."""
    assert query_words("How do I stop the KX-204's pump?") == ["stop", "kx", "204", "pump"]


def test_a_question_of_nothing_else_keeps_them() -> None:
    """Somebody looks for a band, or quotes Hamlet."""
    assert query_words("to be or not to be") == ["to", "be", "or", "not"]
    assert query_words("?! ...") == []


def test_each_word_counts_once_and_not_more_than_so_many() -> None:
    """A page of text as a query must not become a thousand searches."""
    assert query_words("snow Snow rain SNOW") == ["snow", "rain"]
    assert len(query_words(" ".join(f"w{n}" for n in range(1000)))) == MAX_WORDS


def test_an_accent_belongs_to_its_letter_however_it_is_written() -> None:
    """Two spellings of one text, which look the same to whoever types it."""
    assert query_words("e\u0301clair x\u0301y") == ["\u00e9clair", "x\u0301y"]


def test_plain_words_are_letters_and_digits() -> None:
    """Nothing is left in which a parser would see an address, a sign or a hyphen."""
    assert plain_words("See jane@corp.org/a_b: -5 \u00c5rsm\u00f8te, \u201cquoted\u201d, v3.11!") == (
        "see jane corp org a b 5 arsm\u00f8te quoted v3 11"
    )
    assert plain_words(" ?! ") == ""
