"""The set of questions finds hybrid search to be the best, as the documentation says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from llama_stack_memory.embedders.choice import MINILM_PACKAGE
from retrieval_quality import measured, read_set

from llama_stack.apis.memory_banks import QueryMode

pytestmark = pytest.mark.anyio


def test_the_set_is_as_large_as_it_says_and_each_question_has_its_passage() -> None:
    """A number that points nowhere would count as never found."""
    passages, questions = read_set()
    assert len(passages) >= 200
    assert len(questions) >= 60
    assert len(set(passages)) == len(passages)
    assert all(1 <= int(answer) <= len(passages) for _, answer in questions)


@pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="MiniLM is not installed: `make setup` does"
)
async def test_hybrid_search_beats_both_of_its_parts(tmp_path: Path) -> None:
    """With a sentence model it finds what either would miss; the default is what is best."""
    found = await measured("builtin:minilm", tmp_path)
    for part in (QueryMode.VECTOR, QueryMode.KEYWORD):
        assert found[QueryMode.HYBRID].mrr > found[part].mrr
        assert found[QueryMode.HYBRID].first > found[part].first
        assert found[QueryMode.HYBRID].five > found[part].five
