"""``chat`` and ``complete``: the answer as it comes, on stdout and nothing else there."""

from __future__ import annotations

import asyncio
import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_stack.errors import OverloadedError
from tests.cli.called import Ran, Run, Served, process

ANSWER = "Hello from the stub.\n"


def test_one_message_gets_one_answer(run: Run, server: Served) -> None:
    """What a script needs: the answer on stdout, code 0. The only model served needs no name."""
    assert run("chat", "-m", "hi", "--url", server.url) == Ran(0, ANSWER, "")


def test_a_text_is_continued(run: Run, server: Served) -> None:
    """The base model's operation, the same way."""
    assert run("complete", "Once", "--url", server.url, "--model", "stub") == Ran(0, ANSWER, "")


@pytest.mark.parametrize("arguments", [("chat", "-m", "-"), ("complete", "-")])
def test_a_dash_reads_stdin(
    run: Run, server: Served, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """A document may be longer than a command line."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from a pipe é".encode())))
    assert run(*arguments, "--url", server.url) == Ran(0, ANSWER, "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe \xff")))
    ran = run(*arguments, "--url", server.url)
    assert ran == Ran(1, "", "error: the text is not UTF-8: byte 12 of it cannot be read\n")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--model", ""), "model: String should have at least 1 character"),
        (("--max-tokens", "9999999999"), "max_tokens: "),
        (("--model", "a\x00"), "model: "),
    ],
)
def test_what_the_contract_does_not_take_is_refused(
    run: Run, server: Served, arguments: tuple[str, ...], what: str
) -> None:
    """In one line, before anything is sent."""
    for command in (("chat", "-m", "hi"), ("complete", "hi")):
        ran = run(*command, "--url", server.url, *arguments)
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert ran.err.startswith(f"error: {what}")


def test_a_model_cannot_steer_the_terminal(
    run: Run, server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escape sequences in an answer are marks on a terminal, and what they are in a pipe."""
    pieces = ("a\x1b[31m", "b\r\x9b", "\tc\n")
    server.stub.config = server.stub.config.model_copy(update={"pieces": pieces})
    assert run("chat", "-m", "hi", "--url", server.url).out == "".join(pieces) + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("chat", "-m", "hi", "--url", server.url).out == "a\ufffd[31mb\ufffd\ufffd\tc\n\n"


def test_a_failure_in_the_middle_keeps_what_came_and_ends_with_1(run: Run, server: Served) -> None:
    """Half an answer must not look like a whole one to a script."""
    server.stub.failure, server.stub.fail_at = OverloadedError("too busy"), 2
    ran = run("chat", "-m", "hi", "--url", server.url)
    assert (ran.code, ran.out.strip(), ran.err) == (1, "Hello from", "error: too busy\n")


def test_an_unknown_model_is_refused_with_those_there_are(run: Run, server: Served) -> None:
    """The server's own words."""
    ran = run("chat", "-m", "hi", "--url", server.url, "--model", "stubb")
    assert ran == Ran(1, "", "error: model 'stubb' is not served here; served: stub; did you mean 'stub'?\n")


def test_the_choice_among_several_models_is_the_users(run: Run, server: Served) -> None:
    """Which one is meant cannot be guessed."""
    server.stub.config = server.stub.config.model_copy(update={"models": ("a", "b")})
    ran = run("chat", "-m", "hi", "--url", server.url)
    assert ran == Ran(1, "", "error: choose a model with --model; served: a, b\n")


def test_a_conversation_goes_on_after_an_error_and_ends_with_the_input(
    run: Run, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is a message; an error costs that message and nothing else."""

    def said() -> Iterator[str]:
        yield "one"
        yield "  "
        server.stub.failure = OverloadedError("too busy")
        yield "two"
        server.stub.failure = None
        yield "three"

    lines = said()

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    ran = run("chat", "--url", server.url, "--system", "Be brief.")
    assert (ran.code, ran.out) == (0, ANSWER * 2)
    assert "error: too busy\n" in ran.err


def test_piped_lines_are_a_conversation_that_the_first_error_ends(
    run: Run, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script must see the failure in the exit code; no prompt stands between the answers."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert run("chat", "--url", server.url) == Ran(0, ANSWER * 2, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\udcff\nthree\n"))
    ran = run("chat", "--url", server.url)
    assert ran == Ran(1, ANSWER, "error: the text is not UTF-8: byte 0 of it cannot be read\n")


def test_ctrl_c_stops_the_work_on_the_server(server: Served) -> None:
    """Whoever stops reading an answer does not want the rest generated."""
    server.stub.config = server.stub.config.model_copy(update={"repeat": 10_000, "delay_seconds": 0.01})
    with process("chat", "-m", "hi", "--url", server.url) as started:
        assert started.stdout is not None
        assert started.stdout.read(5) == "Hello"
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=60)
    assert (started.returncode, err.strip()) == (130, "")
    server.thread.run(asyncio.wait_for(server.stub.until(stopped=1), 10))
    assert server.stub.finished == 0


def test_a_distribution_can_be_asked_without_a_server(run: Run, tmp_path: Path, server: Served) -> None:
    """The stack runs in the command's own process; here it has nothing but another stack behind it."""
    file = tmp_path / "near.yaml"
    file.write_text(
        "version: 1\nname: near\nproviders:\n  inference:\n"
        f"    - {{ provider: remote, config: {{ url: '{server.url}' }} }}\n"
    )
    assert run("chat", "-m", "hi", "--distribution", str(file)) == Ran(0, ANSWER, "")
    file.write_text("version: 1\nname: near\nprovider: {}\n")
    ran = run("chat", "-m", "hi", "--distribution", str(file))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"error: {file}:3:1: provider: ")
