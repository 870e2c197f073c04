"""What a package shows of itself: its ``__init__.py`` holds public names, and ``__all__`` lists them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted([*ROOT.glob("llama_stack/**/__init__.py"), *ROOT.glob("providers/*/**/__init__.py")])


def names(tree: ast.Module) -> Iterator[str]:
    """The names that a package's file brings into being; it fails for a function or a class, which have files."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        else:
            assert isinstance(node, ast.Expr), f"line {node.lineno} is neither a name nor a word about one"


def listed(tree: ast.Module) -> list[str]:
    """What ``__all__`` says."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found: list[str] = ast.literal_eval(node.value)
            return found
    return []


@pytest.mark.parametrize("file", PACKAGES, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_a_package_lists_every_name_that_it_shows_and_no_other(file: Path) -> None:
    """What is in the list is a promise; a name that is importable and not in it would be one by accident."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert {name for name in names(tree) if not name.startswith("__")} == set(listed(tree))
