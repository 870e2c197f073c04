"""What the core's package holds, as its pyproject.toml says."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_of_the_core_is_packaged() -> None:
    """The list is written out, because the distributions lie beside the package; a new folder is easily missed."""
    folders = {path.parent for path in (ROOT / "llama_stack").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETUPTOOLS["packages"]) == packages | {"llama_stack.distributions"}


def test_the_distributions_are_packaged() -> None:
    """A wheel has them where the core looks for them."""
    assert SETUPTOOLS["package-dir"] == {"llama_stack.distributions": "distributions"}
    assert SETUPTOOLS["package-data"]["llama_stack.distributions"] == ["*.yaml"]
    assert list((ROOT / "distributions").glob("*.yaml"))
