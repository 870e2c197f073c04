"""Plugins that cannot be used, as installed packages: what tests of the loader and of distributions put on the path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

SAFETY_PLUGIN = """
    from contextlib import asynccontextmanager
    from collections.abc import AsyncIterator
    from llama_stack.apis import Safety
    from llama_stack.plugins import ProviderSpec, hookimpl

    @asynccontextmanager
    async def start() -> AsyncIterator[Safety]:
        raise NotImplementedError("never started")
        yield

    @hookimpl
    def llama_stack_providers():
        return [ProviderSpec(api=Safety, name="{name}", start=start)]
"""


def install(
    folder: Path, package: str, modules: Mapping[str, str], entries: Mapping[str, str], version: str = "1.0"
) -> None:
    """Lay a package into a folder on ``sys.path`` as pip would: modules, metadata and entry points."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(dedent(source))
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (info / "entry_points.txt").write_text("[llama_stack]\n" + "\n".join(lines) + "\n")
