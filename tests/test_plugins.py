"""Plugins: found by metadata, loaded one by one, and each fault named with package, cause and remedy."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from llama_stack import plugins
from llama_stack.apis import Api, Config, Safety, post
from llama_stack.apis.common import Message, Role, ShieldConfig
from llama_stack.apis.safety import RunShieldRequest
from llama_stack.distribution import check_distribution, load_distribution
from llama_stack.errors import PluginLoadError
from llama_stack.plugins import (
    ApiSpec,
    CommandSpec,
    FaceSpec,
    MiddlewareSpec,
    Plugin,
    ProviderSpec,
    ToolSpec,
    discover,
    hookimpl,
    load,
)
from llama_stack.registry import Registry, check_provider, declaration_problems
from tests import sample_plugin
from tests.broken_plugins import SAFETY_PLUGIN, install

HOOK = "from llama_stack.plugins import hookimpl\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on ``sys.path``, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def installed(site: Path) -> list[Plugin]:
    """The plugins whose packages lie in the folder."""
    packages = {path.name.split("-")[0].replace("_", "-") for path in site.glob("*.dist-info")}
    return [plugin for plugin in discover() if plugin.package in packages]


def test_discovery_reads_metadata_and_imports_nothing(site: Path) -> None:
    """Each installed plugin would otherwise slow every start, and a broken one would stop it."""
    install(site, "acme-words", {"acme_words": "raise RuntimeError"}, {"acme": "acme_words"}, version="1.2.3")
    [plugin] = installed(site)
    assert (plugin.name, plugin.package, plugin.version, plugin.target) == ("acme", "acme-words", "1.2.3", "acme_words")
    assert plugin.label == "acme-words 1.2.3"
    assert "acme_words" not in sys.modules


def test_entries_of_one_module_are_one_plugin(site: Path) -> None:
    """A module listed under each name that it brings declares its providers once, not once a name."""
    install(site, "acme", {"acme_both": SAFETY_PLUGIN.format(name="a")}, {"a": "acme_both", "b": "acme_both"})
    [plugin] = installed(site)
    assert plugin.names == ("a", "b")
    assert [found.spec.name for found in Registry([plugin]).providers()] == ["a"]


def test_a_start_imports_the_plugins_that_it_names_and_no_others(site: Path) -> None:
    """Fifty installed plugins must not be felt by a distribution that uses one of them."""
    for i in range(50):
        source = SAFETY_PLUGIN.format(name=f"shield-{i}")
        install(site, f"acme-{i}", {f"acme_shield_{i}": source}, {f"shield-{i}": f"acme_shield_{i}"})
    registry = Registry(installed(site))
    assert len(registry.plugins) == 50
    found = registry.provider(Safety, "shield-7")
    assert found.plugin.package == "acme-7"
    assert [name for name in sys.modules if name.startswith("acme_shield_")] == ["acme_shield_7"]


def test_a_provider_whose_entry_has_another_name_is_found_all_the_same(site: Path) -> None:
    """The name of an entry point makes a start quick; it does not decide what is installed."""
    install(site, "acme", {"acme_other": SAFETY_PLUGIN.format(name="gate")}, {"acme": "acme_other"})
    assert Registry(installed(site)).provider(Safety, "gate").plugin.name == "acme"


FAULTS: dict[str, tuple[str, str, str]] = {
    "raises at import": (
        "raise RuntimeError('no licence')",
        "importing it raised RuntimeError: no licence",
        "reinstall",
    ),
    "a text of many lines": ("raise ValueError('one\\ntwo')", "importing it raised ValueError: one", "reinstall"),
    "syntax": ("def broken(:", "importing it raised SyntaxError", "reinstall"),
    "ends the process": ("import sys\nsys.exit(3)", "ended the process", "reinstall"),
    "not even an Exception": ("raise BaseException('odd')", "importing it raised BaseException: odd", "reinstall"),
    "missing dependency": ("import no_such_module_here", "needs the module 'no_such_module_here'", "install what acme"),
    "no hooks": ("x = 1", "implements none of the hooks", "hookimpl"),
    "hook without hookimpl": ("def llama_stack_provider(): ...", "none of the hooks; did you mean", "hookimpl"),
    "unknown hook": (
        HOOK + "@hookimpl\ndef llama_stack_provider(): ...",
        "llama_stack_provider",
        "llama_stack_providers",
    ),
    "hook with arguments": (
        HOOK + "@hookimpl\ndef llama_stack_tools(x): ...",
        "Argument(s) {'x'} are declared",
        "implement the hooks",
    ),
    "hook raises": (
        HOOK + "@hookimpl\ndef llama_stack_tools(): 1 / 0",
        "llama_stack_tools raised ZeroDivisionError",
        "acme",
    ),
    "hook ends the process": (HOOK + "@hookimpl\ndef llama_stack_tools(): exit(1)", "raised SystemExit", "deny it"),
    "hook gives no list": (HOOK + "@hookimpl\ndef llama_stack_tools(): return 1", "raised TypeError", "report it"),
    "hook gives strings": (HOOK + "@hookimpl\ndef llama_stack_tools(): return ['a']", "declares 'str'", "ToolSpec"),
    "bad name": (SAFETY_PLUGIN.format(name="Bad Name"), "raised ValueError: provider 'Bad Name'", "report it"),
    "newer interface": ("llama_stack_api_version = '>=2.0'", "wants version >=2.0", "made for 1.0"),
    "older interface": ("llama_stack_api_version = '>=0.3, <1'", "and this is 1.0", "made for 1.0"),
    "no range": ("llama_stack_api_version = 1", "llama_stack_api_version 1 is not a range", "'>=1.0,<2'"),
    "version words": ("llama_stack_api_version = 'latest'", "'latest' is not a range", "'>=1.0,<2'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_plugin_is_named_with_package_version_cause_and_remedy(case: str, site: Path) -> None:
    """Whoever reads the fault did not write the plugin, and must know which package to act on."""
    source, cause, remedy = FAULTS[case]
    install(site, "acme", {"acme_faulty": source}, {"faulty": "acme_faulty"}, version="4.2")
    [plugin] = installed(site)
    with pytest.raises(PluginLoadError) as refused:
        load(plugin)
    fault = refused.value
    assert (fault.plugin, fault.package, fault.version) == ("faulty", "acme", "4.2")
    assert cause in fault.cause
    assert remedy in fault.remedy
    assert fault.detail == f"plugin 'faulty' of acme 4.2: {fault.cause}; {fault.remedy}"
    assert "\n" not in fault.detail


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("acme_gone", "its module 'acme_gone' does not exist"),
        ("acme_gone.plugin", "its module 'acme_gone' does not exist"),
        ("acme_here:plugin", "has no attribute 'plugin'"),
        ("not a module!", "importing it raised"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_a_fault(target: str, cause: str, site: Path) -> None:
    """A package that was half removed leaves its metadata behind."""
    install(site, "acme", {"acme_here": "x = 1"}, {"gone": target})
    [plugin] = installed(site)
    with pytest.raises(PluginLoadError) as refused:
        load(plugin)
    assert cause in refused.value.cause


def test_an_interrupt_by_the_user_is_not_a_fault_of_the_plugin(site: Path) -> None:
    """Ctrl-C during a slow import must end the command."""
    install(site, "acme", {"acme_slow": "raise KeyboardInterrupt"}, {"slow": "acme_slow"})
    with pytest.raises(KeyboardInterrupt):
        load(installed(site)[0])


@pytest.mark.parametrize("declared", [">=1.0,<2", ">=1", "==1.0", "<=1.0", "> 0.9 , < 1.5"])
def test_a_plugin_may_say_which_interface_it_was_made_for(declared: str, site: Path) -> None:
    """One made for another interface is refused by its own word before it fails in a riddle."""
    source = f"llama_stack_api_version = {declared!r}\n" + dedent(SAFETY_PLUGIN.format(name="words"))
    install(site, "acme", {"acme_made_for": source}, {"words": "acme_made_for"})
    [spec] = load(installed(site)[0])
    assert isinstance(spec, ProviderSpec)


def test_a_plugin_for_another_interface_is_not_even_imported(site: Path) -> None:
    """What its module does at import may need what this version does not have; its source says enough."""
    source = "llama_stack_api_version = '>=2.0'\nraise RuntimeError('imported')"
    package = site / "acme_next"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported too')")
    (package / "plugin.py").write_text(source)
    install(site, "acme", {"acme_flat": source}, {"flat": "acme_flat", "deep": "acme_next.plugin"})
    for plugin in installed(site):
        with pytest.raises(PluginLoadError, match="wants version >=2.0"):
            load(plugin)
    assert not {"acme_flat", "acme_next"} & set(sys.modules)


def test_one_broken_plugin_leaves_the_others_usable(site: Path) -> None:
    """pluggy's own loader stops at the first import error; ours does not."""
    install(site, "bad", {"bad_plugin": "raise RuntimeError"}, {"a-bad": "bad_plugin"})
    install(site, "good", {"good_plugin": SAFETY_PLUGIN.format(name="good")}, {"z-good": "good_plugin"})
    registry = Registry(installed(site))
    assert registry.provider(Safety, "good").plugin.package == "good"
    assert [fault.package for fault in registry.faults] == ["bad"]


def test_a_name_that_is_declared_twice_is_refused_by_the_check_however_its_plugins_are_found(site: Path) -> None:
    """One of them may be imported for another name, after the first look-up; the check must see what the start will."""
    twice = 'return [ProviderSpec(api=Safety, name="words", start=start), '
    both = SAFETY_PLUGIN.format(name="other").replace("return [", twice)
    install(site, "acme-words", {"acme_words": SAFETY_PLUGIN.format(name="words")}, {"words": "acme_words"})
    install(site, "acme-other", {"acme_other": both}, {"other": "acme_other"})
    file = site / "stack.yaml"
    file.write_text("version: 1\nname: d\nproviders: {safety: [{provider: words}, {provider: other}]}\n")
    [fault] = check_distribution(file, environ={}, registry=Registry(installed(site)))
    assert fault.what == "provider 'words' of 'safety' is declared by acme-words 1.0 and by acme-other 1.0"


def test_a_plugin_may_be_an_object_in_this_process() -> None:
    """Tests and notebooks define plugins where they use them."""

    class Local:
        @hookimpl
        def llama_stack_apis(self) -> list[ApiSpec]:
            return [ApiSpec(api=sample_plugin.Translation)]

    plugin = discover([Local()])[0]
    assert (plugin.name, plugin.package) == ("Local", "this process")
    assert [spec.name for spec in load(plugin) if isinstance(spec, ApiSpec)] == ["translation"]


def test_every_hook_is_called_and_its_records_are_kept() -> None:
    """A plugin may bring all six kinds of things at once."""
    kinds = {type(spec).__name__ for spec in load(discover([sample_plugin])[0])}
    assert kinds == {"ProviderSpec", "ApiSpec", "ToolSpec", "FaceSpec", "CommandSpec", "MiddlewareSpec"}


@asynccontextmanager
async def start_nothing() -> Any:
    yield None


async def start_bare() -> Any:
    yield None


class Untyped(Api, name="untyped"):
    """A contract that does not say what is sent."""

    @post("/untyped/next")
    async def next(self, word) -> None:  # type: ignore[no-untyped-def]
        """The next word."""


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: ProviderSpec(api=Safety, name="Words", start=start_nothing), "provider 'Words'"),
        (lambda: ProviderSpec(api=Safety, name="a" * 64, start=start_nothing), "at most 63"),
        (lambda: ProviderSpec(api=Safety, name="words\n", start=start_nothing), "provider 'words"),
        (lambda: ProviderSpec(api=Safety, name="words", start=start_bare), "asynccontextmanager"),
        (lambda: ProviderSpec(api=Safety, name="words", start=None), "asynccontextmanager"),  # type: ignore[arg-type]
        (lambda: ProviderSpec(api=Safety, name="words", start=start_nothing, config=dict), "subclass"),  # type: ignore[arg-type]
        (lambda: ProviderSpec(api=Api, name="words", start=start_nothing), "not a contract"),
        (lambda: ProviderSpec(api="safety", name="words", start=start_nothing), "not a contract"),  # type: ignore[arg-type]
        (lambda: ApiSpec(api=Config), "not a contract"),  # type: ignore[arg-type]
        (lambda: ApiSpec(api=Untyped), "parameter 'word' needs a type"),
        (lambda: ToolSpec(name="dice", start=start_bare), "asynccontextmanager"),
        (lambda: CommandSpec(name="x", help="", target="module"), "MODULE:ATTRIBUTE"),
        (lambda: MiddlewareSpec(name="x", wrap=None), "not a function"),  # type: ignore[arg-type]
    ],
)
def test_a_declaration_that_cannot_work_is_refused_where_it_is_made(
    declare: Callable[[], object], message: str
) -> None:
    """The author sees the line; a string that fails only at run time is seen by somebody else."""
    with pytest.raises((TypeError, ValueError), match=message):
        declare()


def test_a_command_is_imported_when_it_is_called_and_not_before(site: Path) -> None:
    """``--help`` lists commands of all plugins and imports none of their modules."""
    (site / "acme_command.py").write_text("def main(): return 'done'\n")
    spec = CommandSpec(name="acme", help="Do it.", target="acme_command:main")
    assert "acme_command" not in sys.modules
    command: Any = spec.load()
    assert command() == "done"


PAGE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_each_hook_has_its_section_in_the_docs() -> None:
    """A hook that is not written about is not used; a section about none misleads."""
    hooks = {name for name, member in vars(plugins).items() if hasattr(member, "llama_stack_spec")}
    assert len(hooks) == 6
    assert set(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)) == hooks


@pytest.mark.anyio
async def test_the_plugin_on_the_page_works_as_it_is_printed(site: Path) -> None:
    """An author begins by copying it."""
    package = site / "llama_stack_keyword"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(BLOCKS[0])
    (package / "shield.py").write_text(BLOCKS[1])
    install(site, "llama-stack-keyword", {}, {"keyword": "llama_stack_keyword.plugin"})
    text = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    (site / "guarded.yaml").write_text(text)
    registry = Registry(installed(site))
    distribution = load_distribution(site / "guarded.yaml", environ={}, registry=registry)
    assert "llama_stack_keyword.shield" not in sys.modules
    spec = registry.provider(Safety, "keyword").spec
    config = spec.config.model_validate(distribution.providers["safety"][0].config)
    async with spec.start(config=config) as shield:
        check_provider(spec, shield)
        message = Message(role=Role.USER, content="my password is 1234")
        request = RunShieldRequest(messages=[message], shield=ShieldConfig(shield_type="keyword", params={}))
        answer = await shield.run_shield(request)
        assert answer.violation is not None
        assert answer.violation.details == "password"


@pytest.mark.parametrize("block", BLOCKS[2:], ids=lambda block: re.findall(r"def (llama_stack_\w+)", block)[0])
def test_each_example_of_a_hook_declares_what_it_says(block: str, site: Path) -> None:
    """Each stands alone, as an author would try it."""
    install(site, "example", {"acme_example": block}, {"example": "acme_example"})
    [spec] = load(installed(site)[0])
    if isinstance(spec, ProviderSpec | ToolSpec | FaceSpec):
        assert declaration_problems(spec) == []
