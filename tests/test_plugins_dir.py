"""Plugins of one file: found in the folder that a distribution or a command line names, and else plugins like any."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from llama_stack.apis import Safety
from llama_stack.distribution import check_distribution, load_distribution
from llama_stack.plugins import in_folder
from llama_stack.registry import Registry
from llama_stack.stack import Stack, running
from tests.broken_plugins import SAFETY_PLUGIN

SHIELD = """
    from contextlib import asynccontextmanager
    from collections.abc import AsyncIterator
    from llama_stack.apis import Config, Safety
    from llama_stack.apis.safety import RunShieldRequest, RunShieldResponse
    from llama_stack.plugins import ProviderSpec, hookimpl


    class Settings(Config):
        '''What its shield is called.'''

        shield: str


    class Kind(Safety):
        def __init__(self, shield: str) -> None:
            self.shield = shield

        async def shields(self) -> list[str]:
            return [self.shield]

        async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
            return RunShieldResponse()


    @asynccontextmanager
    async def start(config: Settings) -> AsyncIterator[Safety]:
        yield Kind(config.shield)


    @hookimpl
    def llama_stack_providers():
        return [ProviderSpec(api=Safety, name="kind", config=Settings, start=start)]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of plugins beside a distribution; what was imported from it is forgotten afterwards."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("llama_stack_plugin_"):
            del sys.modules[name]


def write(folder: Path, **modules: str) -> None:
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(dedent(source))


def distribution(folder: Path, providers: str, plugins_dir: str | None = "plugins") -> Path:
    """A distribution in the folder above."""
    file = folder.parent / "stack.yaml"
    line = "" if plugins_dir is None else f"plugins_dir: {plugins_dir}\n"
    file.write_text(f"version: 1\nname: small\n{line}providers: {{safety: [{providers}]}}\n")
    return file


@pytest.mark.anyio
async def test_a_plugin_of_one_file_serves_like_any_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An afternoon's idea needs no package; the folder is relative to the file that names it."""
    write(folder, kind=SHIELD, other="raise RuntimeError('never imported')")
    file = distribution(folder, "{provider: kind, config: {shield: mine}}")
    monkeypatch.chdir(folder)
    registry = Registry([])
    found = load_distribution(file, environ={}, registry=registry)
    async with running(Stack(found, registry, state_folder=folder / "state")) as stack:
        assert await stack.api(Safety).shields() == ["mine"]
    assert [plugin.name for plugin in registry.loaded] == ["kind"]
    assert [status.plugin for status in stack.status()] == [str(file.parent / "plugins" / "kind.py")]


def test_what_is_wrong_in_it_is_a_fault_like_any_other(folder: Path) -> None:
    """With the line of the distribution, and the file to mend."""
    write(folder, kind=SHIELD, broken="import no_such_module_at_all")
    file = distribution(folder, "{provider: kind, config: {sheild: mine}}, {provider: broken}")
    faults = [str(fault) for fault in check_distribution(file, environ={}, registry=Registry([]))]
    assert any("did you mean 'shield'?" in fault for fault in faults)
    [broken] = [fault for fault in faults if "no_such_module_at_all" in fault]
    assert f"{file}:4:" in broken


def test_a_command_line_may_name_the_folder(folder: Path) -> None:
    """A folder mounted into a container needs no change of the YAML."""
    from click.testing import CliRunner

    from llama_stack.cli.commands import Commands

    write(folder, gate=SAFETY_PLUGIN.format(name="gate"))
    file = distribution(folder, "{provider: gate}", plugins_dir=None)
    check = CliRunner().invoke(Commands(name="llama-stack"), ["check", str(file), "--plugins-dir", str(folder)])
    assert "no faults" in check.output
    listed = CliRunner().invoke(Commands(name="llama-stack"), ["list", "plugins", "--plugins-dir", str(folder)])
    assert str(folder / "gate.py") in listed.output
    missing = CliRunner().invoke(Commands(name="llama-stack"), ["check", str(file), "--plugins-dir", "no-such"])
    assert missing.exit_code == 2


def test_only_files_with_the_name_of_a_module_are_plugins(folder: Path) -> None:
    """Helpers begin with an underscore; a folder, a note and a link to nowhere are none of them."""
    write(folder, word_list=SHIELD, _shared="")
    (folder / "notes.txt").touch()
    (folder / "not-a-module.py").touch()
    (folder / "package.py").mkdir()
    (folder / "nowhere.py").symlink_to(folder / "gone.py")
    [plugin] = in_folder(folder)
    assert plugin.names == ("word-list", "word_list")


def test_a_file_has_a_module_of_its_own_whatever_it_is_called(folder: Path) -> None:
    """``json.py`` in a folder of plugins takes no other module's place, and a second folder's no first one's."""
    import json

    write(folder, json=SAFETY_PLUGIN.format(name="json"))
    other = folder.parent / "others"
    other.mkdir()
    write(other, json=SAFETY_PLUGIN.format(name="yaml"))
    registry = Registry([*in_folder(folder), *in_folder(other)])
    assert sorted(found.spec.name for found in registry.providers()) == ["json", "yaml"]
    assert sys.modules["json"] is json


def test_a_file_that_was_denied_is_not_imported(folder: Path) -> None:
    """As with installed packages."""
    write(folder, gate="raise RuntimeError('imported')")
    file = distribution(folder, "{provider: gate}")
    file.write_text(file.read_text() + "plugins: {deny: [gate]}\n")
    [fault] = check_distribution(file, environ={}, registry=Registry([]))
    assert "is not admitted" in fault.what
