"""Chunks cover the text, are short enough, and end where sentences end."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from llama_stack_memory import ChunkSettings
from llama_stack_memory.chunking import LONGEST_TOKEN_CHARS, chunk
from llama_stack_memory.interfaces import Span


def words(text: str) -> list[Span]:
    return [match.span() for match in re.finditer(r"\S+", text)]


def texts(text: str, tokens: int, overlap: int) -> list[str]:
    return [c.text for c in chunk(text, words(text), ChunkSettings(tokens, overlap))]


def test_a_short_text_is_one_chunk_without_the_space_around_it() -> None:
    """What most documents are."""
    assert texts("  Snow falls.\n", 20, 5) == ["Snow falls."]
    assert texts(" \n ", 20, 5) == []


def test_chunks_end_with_sentences() -> None:
    """A sentence cut in two says what neither half does."""
    text = "One two three. Four five six. Seven eight. Nine ten eleven twelve."
    assert texts(text, 7, 0) == ["One two three. Four five six.", "Seven eight. Nine ten eleven twelve."]


def test_a_sentence_that_is_too_long_is_cut_between_words() -> None:
    """It must go somewhere."""
    assert texts("a b c d e f g h i j", 4, 0) == ["a b c d", "e f g h", "i j"]


def test_chunks_overlap_by_whole_sentences_where_they_fit() -> None:
    """What refers to the sentence before keeps it in sight."""
    text = "One two three. Four five. Six seven eight. Nine ten."
    assert texts(text, 8, 3) == ["One two three. Four five. Six seven eight.", "Six seven eight. Nine ten."]


def test_a_text_without_a_space_is_cut_all_the_same() -> None:
    """A megabyte that a tokenizer calls one unknown word would else be one chunk."""
    chunks = texts("x" * 100_000, 16, 4)
    assert max(len(text) for text in chunks) < 16 * 2 * LONGEST_TOKEN_CHARS
    assert chunks[0] in "x" * 100_000


def test_no_piece_of_a_long_word_is_short() -> None:
    """A hundred letters are one token as the end of a long word, and may be a hundred as a word of their own."""
    for rest in range(1, LONGEST_TOKEN_CHARS):
        chunks = chunk(text := "x" * (16 * LONGEST_TOKEN_CHARS + rest), words(text), ChunkSettings(16, 0))
        assert min(len(c.text) / c.tokens for c in chunks) >= LONGEST_TOKEN_CHARS


def test_an_overlap_of_half_makes_no_chunk_that_lies_in_another() -> None:
    """Each such chunk would be stored, searched and shown a second time."""
    text = "one two three four. five six seven eight nine ten eleven twelve"
    chunks = chunk(text, words(text), ChunkSettings(8, 4))
    assert all(b.end > a.end for a, b in pairwise(chunks))
    assert all(b.end > a.end for a, b in pairwise(chunk("? ? a ?", words("? ? a ?"), ChunkSettings(2, 1))))


@given(st.text(st.sampled_from("ab .!?\n東é"), max_size=400), st.integers(2, 30), st.integers(0, 15))
def test_every_token_is_in_a_chunk_and_no_chunk_is_too_long(text: str, tokens: int, overlap: int) -> None:
    """Whatever the text is like."""
    spans = words(text)
    chunks = chunk(text, spans, ChunkSettings(tokens, min(overlap, tokens // 2)))
    covered = {n for c in chunks for n, (start, end) in enumerate(spans) if c.start <= start and end <= c.end}
    if all(end - start < 2 * LONGEST_TOKEN_CHARS for start, end in spans):
        assert covered == set(range(len(spans)))
    for c in chunks:
        assert c.text == text[c.start : c.end]
        assert 0 < c.tokens <= tokens
    starts = [c.start for c in chunks]
    assert starts == sorted(set(starts))
    assert all(b.end > a.end for a, b in pairwise(chunks))
