"""Compiling the kernels: once, whole or not at all, and with a reason where it cannot be done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_stack_meta_reference.native import library as module
from llama_stack_meta_reference.native.library import KernelsUnavailableError, library

from tests.providers.meta_reference.kernels import NEEDS_KERNELS


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Without what earlier tests have loaded; theirs stays loaded."""
    library.cache_clear()
    yield
    library.cache_clear()


@NEEDS_KERNELS
def test_the_second_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four seconds once, not at every start; and what is left in the folder is the library alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library()
    made = list((tmp_path / "llama-stack" / "kernels").iterdir())
    assert [path.suffix for path in made] == [".so"]
    library.cache_clear()
    monkeypatch.setattr(module, "_compile", None)
    library()


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator learns what to install."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KernelsUnavailableError, match="no C\\+\\+ compiler is installed"):
        library()


@NEEDS_KERNELS
def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without the instructions ends here: the source refuses it in one line, which is passed on."""
    source = tmp_path / "kernels.cpp"
    source.write_text('#error "needs AVX2"\n')
    (tmp_path / "lanes.h").touch()
    monkeypatch.setattr(module, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelsUnavailableError, match="needs AVX2"):
        library()
    assert list((tmp_path / "llama-stack" / "kernels").iterdir()) == []


@NEEDS_KERNELS
def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a read-only home still serves, on the plain path."""
    (tmp_path / "llama-stack").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelsUnavailableError, match="cannot be compiled or loaded"):
        library()
