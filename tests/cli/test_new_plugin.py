"""``llama-stack new-plugin``: from an empty folder to a server that runs what was written, and the kit that passes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import httpx2
import pytest

from llama_stack.apis import APIS, Inference, Models
from llama_stack.testing.conformance import Verdict, checks_for, run_check
from llama_stack.testing.conformance.in_process import Target, serving_target
from tests.cli.called import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which one is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_smallest_provider_is_small(folder: Path, run: Run) -> None:
    """At most 12 lines of Python and 5 of TOML, so that nobody is kept from beginning."""
    assert run("new-plugin", "shout").code == 0
    made = folder / "llama-stack-shout"
    code = [line for line in (made / "llama_stack_shout.py").read_text().splitlines() if line.strip()]
    project = [line for line in (made / "pyproject.toml").read_text().splitlines() if line.strip()]
    assert (len(code) <= 12, len(project) <= 5) == (True, True)
    assert tomllib.loads("\n".join(project))["project"]["entry-points"]["llama_stack"] == {"shout": "llama_stack_shout"}


@pytest.mark.parametrize("api", [api for api in APIS if api is not Models], ids=lambda api: api.name)
def test_a_plugin_for_any_api_passes_the_kit_as_it_is_written(api: type, folder: Path, run: Run) -> None:
    """What is not written yet answers 501, which breaks no rule; an author sees what is left by what is skipped."""
    assert run("new-plugin", "my-own", "--api", api.name, "--single-file").code == 0  # type: ignore[attr-defined]
    target = Target(api.name, "my-own", plugins_dir=folder)  # type: ignore[attr-defined]
    with serving_target(target) as (thread, subject):
        outcomes = [thread.run(run_check(found, subject)) for found in checks_for(api)]
    assert [(o.check.name, o.reason) for o in outcomes if o.verdict is Verdict.FAILED] == []
    assert any(outcome.verdict is Verdict.PASSED for outcome in outcomes)
    if api is Inference:
        assert sum(outcome.verdict is Verdict.PASSED for outcome in outcomes) > 20


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("Shout",), 2, "lowercase"),
        (("a/b",), 2, "lowercase"),
        (("../up",), 2, "lowercase"),
        (("shout", "--api", "inferense"), 1, "did you mean 'inference'?"),
        (("there",), 2, "exists already"),
        (("there", "--single-file"), 2, "exists already"),
    ],
)
def test_nothing_is_written_over_and_nothing_elsewhere(
    arguments: tuple[str, ...], code: int, said: str, folder: Path, run: Run
) -> None:
    """A name becomes a folder, a module, a package and a key."""
    (folder / "llama-stack-there").mkdir()
    (folder / "there.py").touch()
    before = sorted(path.name for path in folder.iterdir())
    ran = run("new-plugin", *arguments)
    assert ran.code == code
    assert said in ran.err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the core's wheel in it; what it depends on is seen where it is installed."""
    folder = tmp_path_factory.mktemp("author")
    source = folder / "core"
    source.mkdir()
    for name in ("llama_stack", "distributions", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    called([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")])
    wheel(source, folder / "wheels")
    install(folder / "venv", folder / "wheels")
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


def called(command: list[str], **more: str) -> str:
    """What a command of the author's prints; it must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | more
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def wheel(source: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    called([*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(target), str(source)])


def install(venv: Path, wheels: Path) -> None:
    found = [str(path) for path in sorted(wheels.glob("*.whl"))]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "--python",
        str(venv / "bin" / "python"),
    ]
    called([*pip, "install", "--no-index", "--no-deps", *found])


def test_from_an_empty_folder_to_a_server(environment: Path, folder: Path) -> None:
    """Written, built, installed beside the core's wheel, named in YAML, run, called, and held to the kit."""
    python, command = str(environment / "bin" / "python"), str(environment / "bin" / "llama-stack")
    said = called([command, "new-plugin", "shout"])
    made = folder / "llama-stack-shout"
    assert str(made.name) in said
    wheel(made, folder / "wheels")
    install(environment, folder / "wheels")
    [row] = [row for row in json.loads(called([command, "list", "providers", "--json"])) if row["provider"] == "shout"]
    assert row["package"] == "llama-stack-shout 0.1.0"
    assert "no faults" in called([command, "check", str(made / "shout.yaml")])

    with subprocess.Popen(
        [command, "run", str(made / "shout.yaml"), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"LLAMA_STACK_HOME": str(folder / "home")},
    ) as server:
        assert server.stdout is not None
        try:
            found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stdout)
            address = next(match.group() for match in found if match)
            body = {"model": "shout", "content": "one two", "max_tokens": 1}
            reply = httpx2.post(f"{address}/inference/completion", json=body, trust_env=False)
            assert reply.json() == {"content": "one ", "stop_reason": "max_tokens"}
        finally:
            server.terminate()

    kit = called([python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(made / "tests")])
    assert re.search(r"\d+ passed", kit)
    assert "failed" not in kit
    modules = called(
        [python, "-P", "-c", "import llama_stack, llama_stack_shout as s; print(llama_stack.__file__, s.__file__)"]
    )
    assert modules.count(str(environment)) == 2, "the kit ran on other code than what was installed"
