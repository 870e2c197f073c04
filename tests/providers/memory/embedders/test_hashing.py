"""What the embedder without a model promises: the same vector everywhere, near for texts that share words."""

from __future__ import annotations

import numpy as np
from llama_stack_memory.embedders import HashingEmbedder


def test_texts_that_share_words_are_nearer_than_others() -> None:
    """It is all that hashing can do, parts of words included."""
    query, same, related, other = HashingEmbedder().embed(
        ["the sailor left a harbour", "A harbour: the sailor left!", "sailors leaving harbours", "quantum physics"]
    )
    assert query @ same > 0.99
    assert query @ same > query @ related > query @ other + 0.05


def test_vectors_are_the_same_in_every_process() -> None:
    """They outlive it: a hash that is salted, as Python's own is, would make stored vectors noise."""
    vector = HashingEmbedder().embed(["harbour"])[0]
    assert np.flatnonzero(vector).tolist() == [27, 30, 42, 99, 192, 227, 246, 290]
    assert np.isclose(np.linalg.norm(vector), 1)


def test_a_text_without_words_is_nothing() -> None:
    """Zero is not near to anything."""
    assert not HashingEmbedder().embed(["?!", ""]).any()


def test_tokens_are_words_and_marks() -> None:
    """Chunks are counted in them."""
    text = "Well, 3 naïve cats!"
    spans = HashingEmbedder().token_spans(text)
    assert [text[a:b] for a, b in spans] == ["Well", ",", "3", "naïve", "cats", "!"]
