"""The architecture page speaks of files that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PLACES = (ROOT, ROOT / "llama_stack", ROOT / "providers/meta-reference/llama_stack_meta_reference")


def test_every_file_that_the_page_names_is_there() -> None:
    """A newcomer reads the code by this page; files are renamed and pages are not."""
    named = set(re.findall(r"`([\w./-]+(?:\.py|/))`", PAGE))
    assert len(named) > 10
    assert [name for name in sorted(named) if not any((place / name).exists() for place in PLACES)] == []


def test_every_package_has_its_sentence() -> None:
    """A package that the table leaves out is found by chance."""
    rows = set(re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE))
    core = {f"llama_stack/{found.parent.name}" for found in (ROOT / "llama_stack").glob("*/__init__.py")}
    modules = {f"llama_stack/{found.name}" for found in (ROOT / "llama_stack").glob("[a-z]*.py")}
    providers = {f"providers/{found.parent.name}" for found in (ROOT / "providers").glob("*/pyproject.toml")}
    assert core | modules | providers <= rows
