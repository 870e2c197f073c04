"""Which way imports point: plugins to the core, the core to its contracts, the contracts to nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "llama_stack"
PROVIDERS = ROOT / "providers"
PROVIDER_PACKAGES = {package.parent.name for package in PROVIDERS.glob("*/*/__init__.py")}

MODEL_LIBRARIES = {"torch", "numpy", "pandas", "transformers", "safetensors", "tiktoken", "tokenizers", "fairscale"}
SERVER_LIBRARIES = {"fastapi", "starlette", "uvicorn", "sqlalchemy", "aiosqlite", "asyncpg", "httpx2", "httpx"}
HEAVY = MODEL_LIBRARIES | SERVER_LIBRARIES | {"openai", "faiss", "pypdf", "pyarrow", "prometheus_client"}


def imported_by(code: str, *paths: Path) -> set[str]:
    """The top-level modules that a fresh interpreter has imported once it has run the code."""
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *paths]))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """The names that a file imports, wherever in the file, and the level of its relative imports.

    ``from llama_stack import stack`` is ``llama_stack.stack``; so is everything else that comes from a package's root.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or "." in (module := node.module or ""):
                yield node.module or "", node.level
            else:
                yield from ((f"{module}.{alias.name}", 0) for alias in node.names)


def test_the_contracts_import_neither_a_server_nor_a_tensor() -> None:
    """Plugin authors and clients depend on the contracts; they should not carry a web framework for it."""
    assert not imported_by("import llama_stack.apis") & HEAVY
    assert not imported_by("import llama_stack.errors") & (HEAVY | {"pydantic"})


def test_the_contracts_import_nothing_above_them_but_the_errors() -> None:
    """The ground floor carries the house and leans on nothing in it."""
    for file in (CORE / "apis").glob("*.py"):
        for name, level in imports(file):
            assert not name.startswith("llama_stack"), file
            assert level < 2 or name == "errors", (file, name)


def test_the_core_imports_no_provider_and_no_model_library() -> None:
    """Deleting a folder under providers/ must break only the distributions that name it."""
    files = list(CORE.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for name, _level in imports(file):
            top = name.partition(".")[0]
            assert top not in MODEL_LIBRARIES | PROVIDER_PACKAGES | {"tests"}, (file, name)
            assert top == "llama_stack" or not top.startswith("llama_stack"), (file, name)


def test_providers_import_the_core_only_where_it_is_open_to_them() -> None:
    """A stranger's plugin has the contracts, the errors, the hooks, the store and the kit; ours have no more."""
    open_to_plugins = (
        "apis",
        "plugins",
        "errors",
        "storage",
        "testing",
        "client",
        "children",
        "inner",
        "text_inference",
        "shields",
        "fetch",
        "tools",
        "turns",
    )
    open_to_commands = ("cli.options", "cli.output")  # a plugin's commands take and print what the core's do
    for file in PROVIDERS.rglob("*.py"):
        for name, _level in imports(file):
            top, _, rest = name.partition(".")
            if top == "llama_stack" and rest:
                is_open = rest.partition(".")[0] in open_to_plugins or rest in open_to_commands
                assert is_open, (file, name)


@pytest.mark.parametrize("package", sorted(PROVIDER_PACKAGES))
def test_providers_import_no_other_provider(package: str) -> None:
    """A provider that needs another API is given the routed one."""
    others = PROVIDER_PACKAGES - {package}
    for file in PROVIDERS.glob(f"*/{package}/**/*.py"):
        assert not {name.partition(".")[0] for name, _level in imports(file)} & others, file


@pytest.mark.parametrize("file", sorted(PROVIDERS.glob("*/*/plugin.py")), ids=lambda file: file.parent.name)
def test_declaring_a_plugin_imports_nothing_heavy(file: Path) -> None:
    """Fifty installed plugins must not slow a start that uses none of them."""
    loaded = imported_by(f"import {file.parent.name}.plugin", file.parents[1])
    assert not loaded & HEAVY


def test_the_command_line_opens_without_the_house() -> None:
    """``--help`` answers in a blink: what a command needs is imported when the command runs."""
    assert not imported_by("import llama_stack.cli") & HEAVY


def test_the_arrows_can_be_seen_to_fail(tmp_path: Path) -> None:
    """The probe must see an import that is there, in whichever way it is written."""
    (tmp_path / "sly.py").write_text("from llama_stack import stack\n\ndef late():\n    import torch.nn\n")
    assert list(imports(tmp_path / "sly.py")) == [("llama_stack.stack", 0), ("torch.nn", 0)]
    assert "pydantic" in imported_by("import llama_stack.apis")
    assert ("..errors", 0) not in imports(CORE / "apis" / "contract.py")
    assert ("errors", 2) in imports(CORE / "apis" / "contract.py")
