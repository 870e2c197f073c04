"""The set of questions finds hybrid search to be the best, as the documentation says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from llama_stack_memory.embedders.choice import MINILM_PACKAGE
from retrieval_quality import SETS, measured, read_passages, read_questions

from llama_stack.apis.memory_banks import QueryMode

pytestmark = pytest.mark.anyio


def test_the_sets_are_as_large_as_they_say_and_share_no_question() -> None:
    """A number that points nowhere would count as never found, and a question of both sets is not held out."""
    passages = read_passages()
    assert len(passages) >= 200
    assert len(set(passages)) == len(passages)
    seen: set[str] = set()
    for name in SETS:
        questions = read_questions(name)
        assert len(questions) >= 60
        assert all(1 <= int(answer) <= len(passages) for _, answer in questions)
        asked = {question for question, _ in questions}
        assert len(asked) == len(questions)
        assert seen.isdisjoint(asked)
        seen |= asked


@pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="MiniLM is not installed: `make setup` does"
)
async def test_hybrid_search_beats_both_of_its_parts(tmp_path: Path) -> None:
    """With a sentence model it finds what either would miss, also on questions that nothing was chosen by.

    Among the first five there is no room left above search by vector, which has all but one of the held out ones.
    """
    for found in (await measured("builtin:minilm", tmp_path)).values():
        for part in (QueryMode.VECTOR, QueryMode.KEYWORD):
            assert found[QueryMode.HYBRID].mrr > found[part].mrr
            assert found[QueryMode.HYBRID].first > found[part].first
            assert found[QueryMode.HYBRID].five >= found[part].five
