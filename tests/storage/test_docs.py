"""What docs/storage.md shows is what works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from llama_stack.errors import (
    BlobCorruptError,
    StackError,
    StorageFullError,
    StoreBusyError,
    StoreFailedError,
    StoreUnavailableError,
)
from llama_stack.storage import Store

PAGE = Path(__file__).parents[2] / "docs" / "storage.md"


@pytest.mark.anyio
async def test_the_provider_on_the_page_runs_on_both_stores(store: Store, tmp_path: Path) -> None:
    """A plugin author begins by copying it."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "notes_example.py").write_text(example)
    spec = importlib.util.spec_from_file_location("notes_example", tmp_path / "notes_example.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    async with module.start_notes(store.database("docs.notes"), store.blobs("docs.notes")) as notes:
        await notes.add("b", "second")
        await notes.add("a", "first")
        assert await notes.all() == ["first", "second"]


@pytest.mark.parametrize(
    "error", [StorageFullError, StoreBusyError, StoreUnavailableError, StoreFailedError, BlobCorruptError]
)
def test_each_failure_has_its_row_on_the_page(error: type[StackError]) -> None:
    """An operator looks up the code that the answer gave."""
    assert f"| {error.status} `{error.code}` |" in PAGE.read_text()
