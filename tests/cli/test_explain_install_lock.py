"""Commands about one distribution: the way of a request, the packages to install, and a lock on what runs."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import httpx2
import pytest

from llama_stack.distribution import load_distribution, lock_path, verified_lock
from llama_stack.plugins import in_folder
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from tests.broken_plugins import SAFETY_PLUGIN
from tests.cli.called import Run

TWO = """\
version: 1
name: two
providers:
  inference:
    - {provider: remote, id: near, config: {url: "http://127.0.0.1:1"}}
    - {provider: remote, id: far, optional: true, config: {url: "http://127.0.0.1:2"}}
  safety: [{provider: llama_guard, config: {model: m}}]
tools: [{tool: math}]
"""


@pytest.fixture
def two(tmp_path: Path) -> str:
    """A distribution with two providers of one API, and one that needs that API."""
    file = tmp_path / "two.yaml"
    file.write_text(TWO)
    return str(file)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ("POST /inference/chat_completion", ["the first of them that holds the 'model'", "provider 1  near (remote)"]),
        ("post  /inference/chat_completion", ["Inference.chat_completion, of the draft: Answer a dialog"]),
        ("POST /inference/completion", ["provider 2  far (remote) of llama-stack-remote", "optional: 503"]),
        ("POST /safety/run_shield", ["an extension", "the only provider", "inference, from near, far"]),
        ("GET /models/list", ["the stack itself"]),
        ("POST /datasets/create", ["none: the request is answered 501"]),
    ],
)
def test_the_way_of_a_request_is_told(operation: str, said: list[str], two: str, run: Run) -> None:
    """Which provider answers, and why that one, is read off the file: nothing has to be tried."""
    ran = run("explain", two, operation)
    assert ran.code == 0
    for words in said:
        assert words in ran.out


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ("GET /inference/completion", "did you mean 'POST /inference/completion'?"),
        ("POST /inference/chat_complete", "did you mean 'POST /inference/chat_completion'?"),
        ("nonsense", "no API has the operation"),
    ],
)
def test_an_operation_that_is_none_is_refused_with_what_comes_near(
    operation: str, said: str, two: str, run: Run
) -> None:
    """The method belongs to the name, and is the first thing to be forgotten."""
    ran = run("explain", two, operation)
    assert ran.code == 1
    assert said in ran.err


def test_the_packages_of_a_distribution_are_one_line_to_copy(two: str, run: Run) -> None:
    """What runs here is moved to another machine by that line and the file."""
    ran = run("install", two)
    assert ran.code == 0
    words = ran.out.split()
    assert words[:2] == ["pip", "install"]
    packages = {word.partition("==")[0] for word in words[2:]}
    assert packages == {"llama-stack-remote", "llama-stack-safety", "llama-stack-agents"}


def test_what_the_distribution_requires_is_checked_and_named_by_install(tmp_path: Path, run: Run) -> None:
    """On a machine where nothing is installed yet, only the file can say which package brings a provider."""
    file = tmp_path / "stack.yaml"
    file.write_text(
        'version: 1\nname: small\nrequires: ["no-such-package-of-ours>=1.2,<2"]\n'
        "providers: {safety: [{provider: nobody}]}\n"
    )
    checked = run("check", str(file))
    assert "requires[0]: the package no-such-package-of-ours>=1.2,<2 is not installed" in checked.out
    assert run("install", str(file)).out == "pip install 'no-such-package-of-ours>=1.2,<2'\n"
    file.write_text("version: 1\nname: small\nproviders: {safety: [{provider: nobody}]}\n")
    refused = run("install", str(file))
    assert refused.code == 1
    assert "no installed plugin declares the provider 'nobody' of 'safety'" in refused.err


@pytest.mark.parametrize(
    "requirement", ["-r other.txt", "--index-url=x", "name @ file:///x", "a;b", "../here", "a b", ""]
)
def test_a_requirement_is_a_package_and_no_option_of_pip(requirement: str, tmp_path: Path, run: Run) -> None:
    """It is handed to pip: a file that somebody else wrote must not say where to install from."""
    file = tmp_path / "stack.yaml"
    file.write_text(f"version: 1\nname: small\nrequires: [{json.dumps(requirement)}]\n")
    assert "requires[0]" in run("check", str(file)).out
    assert run("install", str(file)).code == 1


@pytest.fixture
def locked(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with a plugin of one file and a secret, and its lock."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "gate.py").write_text(dedent(SAFETY_PLUGIN.format(name="gate")))
    file = tmp_path / "stack.yaml"
    file.write_text(
        "version: 1\nname: locked\nplugins_dir: plugins\nproviders:\n"
        '  inference: [{provider: remote, config: {url: "${env.SERVER}", api_key: "${env.KEY}"}, optional: true}]\n'
        "  safety: [{provider: gate, optional: true}]\nserver: {port: 0}\n"
    )
    monkeypatch.setenv("SERVER", "http://127.0.0.1:1")
    monkeypatch.setenv("KEY", "canary-of-the-lock")
    ran = run("lock", str(file))
    assert ran.code == 0, ran.err
    return file


def test_a_lock_holds_versions_hashes_and_no_secret(locked: Path) -> None:
    """It is made to be committed."""
    text = lock_path(locked).read_text()
    lock = json.loads(text)
    assert lock["plugins"]["llama-stack-remote"]["version"]
    assert set(lock["plugins"]) == {"llama-stack-remote", "gate.py"}
    assert "canary" not in text


async def _version(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    import os

    registry = Registry()
    distribution = load_distribution(file, environ=os.environ, registry=registry)
    digest = verified_lock(str(file), distribution, registry, os.environ)
    stack = Stack(distribution, registry, state_folder=file.parent / "state", lock=digest)
    async with running(stack), listening(stack) as server, httpx2.AsyncClient(base_url=server.url) as http:
        answer: dict[str, str] = (await http.get("/version")).json()
        return answer


@pytest.mark.anyio
async def test_a_start_that_is_as_locked_shows_the_digest(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines that show one digest run the same; a secret may be another on each."""
    first = await _version(locked, monkeypatch)
    monkeypatch.setenv("KEY", "another")
    second = await _version(locked, monkeypatch)
    assert first["lock"] == second["lock"] != ""
    lock_path(locked).unlink()
    assert "lock" not in await _version(locked, monkeypatch)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file, set_: file.write_text(file.read_text().replace("port: 0", "port: 1")), "what the distribution"),
        (lambda file, set_: set_("SERVER", "http://127.0.0.1:2"), "in a variable"),
        (lambda file, set_: _append(file.parent / "plugins" / "gate.py", "# more\n"), "gate.py has other contents"),
        (lambda file, set_: _replace(lock_path(file), '"0.1.0"', '"0.0.9"'), "llama-stack was 0.0.9"),
        (
            lambda file, set_: _replace(lock_path(file), "llama-stack-remote", "other"),
            "llama-stack-remote was not used",
        ),
        (lambda file, set_: lock_path(file).write_text("{"), "the lock cannot be read"),
        (lambda file, set_: lock_path(file).write_text("[]"), "it is not of version 1"),
    ],
)
def test_a_start_that_is_not_as_locked_is_refused_with_what_changed(
    change: object, said: str, locked: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """An upgrade that nobody asked for is found before it serves anybody."""
    change(locked, monkeypatch.setenv)  # type: ignore[operator]
    ran = run("run", str(locked))
    assert ran.code == 1
    assert said in ran.err
    assert "llama-stack lock" in ran.err


def test_what_stands_behind_a_provider_is_locked_and_installed_too(tmp_path: Path, run: Run) -> None:
    """An upgrade of a provider that only a wrapper names changes what runs."""
    file = tmp_path / "stack.yaml"
    inner = '{provider: remote, id: ID, config: {url: "http://127.0.0.1:1"}}'
    both = ", ".join(inner.replace("ID", name) for name in ("a", "b"))
    file.write_text(
        "version: 1\nname: small\nproviders:\n  inference:\n"
        f"    - {{provider: fallback, config: {{providers: [{both}]}}}}\n"
    )
    assert run("lock", str(file)).code == 0
    assert set(json.loads(lock_path(file).read_text())["plugins"]) == {"llama-stack-composition", "llama-stack-remote"}
    assert "llama-stack-remote==" in run("install", str(file)).out


def test_what_is_shipped_is_not_locked_in_its_own_folder(run: Run) -> None:
    """The folder of an installed package is no place for an operator's file."""
    ran = run("lock", "tiny")
    assert ran.code == 1
    assert "extends: tiny" in ran.err


def test_files_of_a_folder_are_in_the_lock_by_their_contents(locked: Path) -> None:
    """Not by their time or their place."""
    [plugin] = in_folder(locked.parent / "plugins")
    lock = json.loads(lock_path(locked).read_text())
    plugin.file.touch()  # type: ignore[union-attr]
    assert verified_lock(
        str(locked),
        load_distribution(locked, environ={"SERVER": "http://127.0.0.1:1", "KEY": "k"}, registry=(known := Registry())),
        known,
        {"SERVER": "http://127.0.0.1:1", "KEY": "k"},
    )
    assert lock["plugins"]["gate.py"]["contents"].startswith("sha256:")


def _append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


def _replace(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new, 1))
