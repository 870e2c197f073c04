"""Compiling the kernels: once, whole or not at all, and with a reason where it cannot be done."""

from __future__ import annotations

import os
import pwd
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
@pytest.mark.parametrize(("command", "cause"), [("no-such-compiler -O1", r"\(no-such-compiler\)"), ("'", "no command")])
def test_a_compiler_that_is_not_there_is_named(command: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To say that g++ is missing where CXX is wrong sends the operator the wrong way."""
    monkeypatch.setenv("CXX", command)
    with pytest.raises(KernelsUnavailableError, match=cause):
        library()


@NEEDS_KERNELS
def test_the_compiler_may_have_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``CXX="ccache g++"``; and other arguments make another library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for command in ("env g++", "env g++ -g0"):
        monkeypatch.setenv("CXX", command)
        library.cache_clear()
        library()
    assert len(list((tmp_path / "llama-stack" / "kernels").iterdir())) == 2


@NEEDS_KERNELS
def test_a_processor_without_the_instructions_is_told_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler begins with the way to the line that refuses, which alone says nothing."""
    monkeypatch.setattr(module, "_PROCESSOR_FLAG", "-march=x86-64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelsUnavailableError, match="needs AVX-512 with VNNI, or AVX2"):
        library()


@NEEDS_KERNELS
def test_a_library_that_was_cut_short_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A crash while the disk's cache was not written would otherwise leave this machine slow for good."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    library()
    (made,) = (tmp_path / "whole" / "llama-stack" / "kernels").iterdir()
    cut = tmp_path / "cut" / "llama-stack" / "kernels" / made.name
    cut.parent.mkdir(parents=True)
    cut.touch(mode=0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cut"))
    library.cache_clear()
    library()
    assert "compiled again" in caplog.text
    assert cut.stat().st_size == made.stat().st_size


@NEEDS_KERNELS
def test_a_library_that_others_could_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name can be foretold: in a folder that users share, one of them could run code as another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    previous = os.umask(0)
    try:
        library()
    finally:
        os.umask(previous)
    folder = tmp_path / "llama-stack" / "kernels"
    (made,) = folder.iterdir()
    for place in (made, folder):
        library.cache_clear()
        library()  # even without a umask it is its maker's alone
        place.chmod(0o777)
        library.cache_clear()
        with pytest.raises(KernelsUnavailableError, match=f"{place} can be written by other users"):
            library()
        place.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(made, 12345, -1)
        with pytest.raises(KernelsUnavailableError, match="other users"):
            library()


def test_a_user_without_a_home_gets_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run under numbers that no user has; they still serve, on the plain path."""

    def no_such_user(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    with pytest.raises(KernelsUnavailableError, match="set HOME or XDG_CACHE_HOME|no C\\+\\+ compiler"):
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
