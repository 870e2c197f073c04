"""The registry: what is installed by name, what a start function needs, and what is wrong with a declaration."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from llama_stack.apis import APIS, Api, Config, Inference, MemoryBanks, Safety, get, post
from llama_stack.errors import ContractMismatchError, DuplicateProviderError, NotInstalledError
from llama_stack.plugins import ApiSpec, Plugin, ProviderSpec, discover, hookimpl
from llama_stack.registry import NeedKind, Registry, check_provider, declaration_problems, needs
from llama_stack.storage import Blobs, Database, Folder
from tests import sample_plugin


def plugin(declared: list[ProviderSpec] | list[ApiSpec], package: str = "this process") -> Plugin:
    """A plugin of this process that declares these."""

    class Local:
        @hookimpl
        def llama_stack_providers(self) -> list[ProviderSpec]:
            return [spec for spec in declared if isinstance(spec, ProviderSpec)]

        @hookimpl
        def llama_stack_apis(self) -> list[ApiSpec]:
            return [spec for spec in declared if isinstance(spec, ApiSpec)]

    return Plugin(("local",), package, "", loaded=Local())


@pytest.fixture
def registry() -> Registry:
    return Registry(discover([sample_plugin])[:1])


WORDS = ProviderSpec(api=Safety, name="words", start=sample_plugin.start_words, config=sample_plugin.WordsConfig)


def test_everything_that_a_plugin_declares_is_found_by_name(registry: Registry) -> None:
    """A distribution names things; this is where the names lead."""
    assert registry.api("translation") is sample_plugin.Translation
    assert registry.provider(Safety, "words").spec.config is sample_plugin.WordsConfig
    assert registry.tool("dice").spec.name == "dice"
    assert registry.face("plain").spec.name == "plain"
    assert registry.command("echo").spec.help == "Say it again."
    assert registry.middleware("audit").plugin.package == "this process"


def test_lists_hold_everything_once(registry: Registry) -> None:
    """``llama-stack list`` shows them."""
    assert [found.spec.api for found in registry.apis()] == [*APIS, sample_plugin.Translation]
    assert ("safety", "words") in [(found.spec.api.name, found.spec.name) for found in registry.providers()]
    assert [found.spec.name for found in registry.tools()] == ["dice"]
    assert [found.spec.name for found in registry.faces()] == ["odd-face", "plain", "talk"]
    assert [found.spec.name for found in registry.commands()] == ["echo"]
    assert [found.spec.name for found in registry.middlewares()] == ["audit"]


@pytest.mark.parametrize(
    ("look_up", "what", "remedy"),
    [
        (lambda r: r.api("safty"), "the API 'safty'", "did you mean 'safety'?"),
        (lambda r: r.provider(Safety, "wrods"), "the provider 'wrods' of 'safety'", "did you mean 'words'?"),
        (lambda r: r.provider(Safety, "zzz"), "the provider 'zzz' of 'safety'", "installed: careful, words"),
        (lambda r: r.provider(Safety, "echo"), "the provider 'echo' of 'safety'", "'echo' provides inference"),
        (lambda r: r.tool("dices"), "the tool 'dices'", "did you mean 'dice'?"),
        (lambda r: r.face("zzz"), "the face 'zzz'", "installed: odd-face, plain, talk"),
        (lambda r: r.command("ecko"), "the command 'ecko'", "did you mean 'echo'?"),
        (lambda r: r.middleware("zzz"), "the middleware 'zzz'", "installed: audit"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(
    look_up: Callable[[Registry], object], what: str, remedy: str, registry: Registry
) -> None:
    """Most unknown names are misspelt ones."""
    with pytest.raises(NotInstalledError) as refused:
        look_up(registry)
    assert what in refused.value.what
    assert remedy in refused.value.remedy


def test_two_packages_that_declare_one_provider_are_both_named() -> None:
    """Which of the two ran would depend on the order of folders on the path."""
    registry = Registry([plugin([WORDS], "first-words"), plugin([WORDS], "second-words")])
    with pytest.raises(DuplicateProviderError, match="provider 'words' of 'safety' .* first-words and by second-words"):
        registry.provider(Safety, "words")
    assert len(registry.duplicates) == 1


def test_one_name_may_provide_several_apis() -> None:
    """``meta-reference`` provides inference, post-training and reward scoring."""
    echo = ProviderSpec(api=Inference, name="words", start=sample_plugin.start_echo, config=sample_plugin.EchoConfig)
    registry = Registry([plugin([WORDS, echo])])
    assert registry.provider(Safety, "words").spec is WORDS
    assert registry.provider(Inference, "words").spec is echo


def test_a_plugin_that_declares_one_thing_twice_is_at_fault() -> None:
    """No second package is involved, so the fault is its own."""
    registry = Registry([plugin([WORDS, WORDS])])
    registry.load_all()
    assert [fault.cause for fault in registry.faults] == ["it declares provider 'words' of 'safety' twice"]


def test_a_plugin_cannot_take_the_place_of_a_core_api() -> None:
    """Every other plugin was written for the contract that the core has."""

    class OtherSafety(Api, name="safety"):
        @get("/other/list", extension=True)
        async def others(self) -> list[str]:
            """Nothing."""
            raise NotImplementedError

    class SamePath(Api, name="same_path"):
        @post("/safety/run_shield", extension=True)
        async def run(self) -> None:
            """Nothing."""

    class TwicePath(Api, name="twice_path"):
        @post("/twice/run", extension=True)
        async def run(self) -> None:
            """Nothing."""

        @post("/twice/run", extension=True)
        async def run_again(self) -> None:
            """Nothing."""

    for api, cause in (
        (OtherSafety, "which llama-stack brings"),
        (TwicePath, "POST /twice/run, which 'twice_path'"),
        (SamePath, "POST /safety/run_shield, which 'safety'"),
    ):
        registry = Registry([plugin([ApiSpec(api=api)])])
        assert registry.api("safety") is Safety
        assert cause in registry.faults[0].cause


def test_a_path_belongs_to_the_api_that_was_there_first() -> None:
    """Two APIs of two packages on one path: the server could not tell which of them a request means."""

    class First(Api, name="first"):
        @post("/shared/run", extension=True)
        async def run(self) -> None:
            """Nothing."""

    class Second(Api, name="second"):
        @post("/shared/run", extension=True)
        async def run(self) -> None:
            """Nothing."""

    registry = Registry([plugin([ApiSpec(api=First)], "one"), plugin([ApiSpec(api=Second)], "two")])
    assert registry.api("first") is First
    assert [(fault.package, fault.cause) for fault in registry.faults] == [
        ("two", "its API 'second' has the operation POST /shared/run, which 'first' has")
    ]


def test_needs_are_read_off_the_annotations() -> None:
    """The parameters of a start function are its needs: nothing is declared a second time."""

    @asynccontextmanager
    async def start(
        config: sample_plugin.WordsConfig,
        inference: Inference,
        banks: MemoryBanks | None,
        database: Database,
        blobs: Blobs,
        folder: Folder,
        *,
        other: sample_plugin.Translation | None = None,
    ) -> AsyncIterator[Safety]:
        yield sample_plugin.WordShield(())

    found = [(need.parameter, need.kind, need.api, need.is_optional) for need in needs(start)]
    assert found == [
        ("config", NeedKind.CONFIG, None, False),
        ("inference", NeedKind.API, Inference, False),
        ("banks", NeedKind.API, MemoryBanks, True),
        ("database", NeedKind.DATABASE, None, False),
        ("blobs", NeedKind.BLOBS, None, False),
        ("folder", NeedKind.FOLDER, None, False),
        ("other", NeedKind.API, sample_plugin.Translation, True),
    ]


def test_a_need_that_nobody_can_meet_names_its_parameter() -> None:
    """All of them in one error, before anything is started."""

    @asynccontextmanager
    async def start(  # type: ignore[no-untyped-def]
        untyped,
        number: int,
        either: Inference | Safety,
        shield: sample_plugin.WordShield,
        later: "NotImportedHere",  # type: ignore[name-defined]  # noqa: F821, UP037
        moved: "inspect.NotThere",  # type: ignore[name-defined]  # noqa: UP037
        *rest: Safety,
    ) -> AsyncIterator[Safety]:
        yield sample_plugin.WordShield(())

    with pytest.raises(ContractMismatchError) as refused:
        needs(start)
    assert "test_registry" in str(refused.value)
    for parameter, phrase in (
        ("untyped", "has no type"),
        ("number", "asks for int"),
        ("either", "asks for"),
        ("shield", "which is a provider, where its contract Safety belongs"),
        ("later", "cannot be read at run time"),
        ("moved", "cannot be read at run time"),
        ("rest", "cannot be passed by its name"),
    ):
        assert [p for p in refused.value.problems if p.startswith(f"parameter {parameter!r} ") and phrase in p]
    assert len(refused.value.problems) == 7


class OtherConfig(Config):
    """Not the declared one."""


@asynccontextmanager
async def start_other(config: OtherConfig) -> AsyncIterator[Safety]:
    yield sample_plugin.WordShield(())


@asynccontextmanager
async def start_inference() -> AsyncIterator[Inference]:
    yield sample_plugin.never()


@asynccontextmanager
async def start_concrete() -> AsyncIterator[sample_plugin.WordShield]:
    yield sample_plugin.WordShield(())


def test_a_declaration_is_checked_before_anything_is_started() -> None:
    """``check`` starts nothing, and still finds a provider that could never run."""
    assert declaration_problems(WORDS) == []
    assert declaration_problems(ProviderSpec(api=Safety, name="x", start=start_concrete)) == []
    [problem] = declaration_problems(
        ProviderSpec(api=Safety, name="x", start=start_other, config=sample_plugin.WordsConfig)
    )
    assert problem == "parameter 'config' is OtherConfig, and config= WordsConfig"
    [problem] = declaration_problems(ProviderSpec(api=Safety, name="x", start=start_inference))
    assert problem == "Inference is not a subclass of Safety"


def test_a_started_provider_must_be_one_of_its_api() -> None:
    """The last look before a request reaches it."""
    check_provider(WORDS, sample_plugin.WordShield(()))
    with pytest.raises(ContractMismatchError, match="it yields object, not a subclass of Safety"):
        check_provider(WORDS, object())
    with pytest.raises(ContractMismatchError, match="Dictionary is not a subclass of Safety"):
        check_provider(WORDS, sample_plugin.Dictionary())
