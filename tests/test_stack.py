"""Start and stop of a distribution's providers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import Field

from llama_stack.apis import Api, Config, Models, post
from llama_stack.distribution import Distribution, load_distribution
from llama_stack.errors import (
    ContractMismatchError,
    NotProvidedError,
    ProviderStartError,
    ProviderUnavailableError,
    UnavailableError,
)
from llama_stack.plugins import ApiSpec, FaceSpec, ProviderSpec, discover, hookimpl
from llama_stack.registry import Registry
from llama_stack.stack import Stack, State, running
from llama_stack.storage import Blobs, Database, Folder

pytestmark = pytest.mark.anyio


class Letters(Api, name="letters", routed_by="letter"):
    """The lower of two APIs."""

    @post("/letters/next")
    async def next(self, letter: str) -> str:
        """The letter after."""
        raise NotImplementedError


class Words(Api, name="words"):
    """The upper one, which needs the lower."""

    @post("/words/next")
    async def next(self, word: str) -> str:
        """The word after."""
        raise NotImplementedError


class Alphabet(Letters):
    async def next(self, letter: str) -> str:
        return chr(ord(letter) + 1)


class Dictionary(Words):
    def __init__(self, letters: Letters | None) -> None:
        self.letters = letters

    async def next(self, word: str) -> str:
        assert self.letters is not None
        return word[:-1] + await self.letters.next(word[-1])


class Flaky(Config):
    """Fails as often as told."""

    failures: int = 0


class Raising(Config):
    """What is raised at the start."""

    what: str


class Exact(Config):
    """Takes nothing that is merely like what it wants."""

    letters: tuple[str, ...] = Field(strict=True)
    folder: Path = Field(strict=True)


class World:
    """A plugin whose providers write down what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.attempts = 0
        self.tried = asyncio.Event()
        self.may_break = asyncio.Event()
        self.may_retry = asyncio.Event()

    def plugin(self) -> object:
        @asynccontextmanager
        async def start_alphabet(config: Flaky) -> AsyncIterator[Letters]:
            self.attempts += 1
            self.tried.set()
            if self.attempts > 1:
                await self.may_retry.wait()
            if self.attempts <= config.failures:
                raise OSError("secret path /etc/alphabet")
            task = asyncio.current_task()
            self.events.append("alphabet up")
            yield Alphabet()
            assert asyncio.current_task() is task
            self.events.append("alphabet down")

        @asynccontextmanager
        async def start_dictionary(letters: Letters) -> AsyncIterator[Words]:
            self.events.append("dictionary up")
            yield Dictionary(letters)
            self.events.append("dictionary down")

        @asynccontextmanager
        async def start_alone(letters: Letters | None) -> AsyncIterator[Words]:
            self.events.append(f"alone with {letters}")
            yield Dictionary(letters)

        @asynccontextmanager
        async def start_stored(database: Database, blobs: Blobs, folder: Folder) -> AsyncIterator[Letters]:
            await blobs.put(b"kept")
            (folder.path / "kept").touch()
            self.events.append(type(database).__name__)
            yield Alphabet()

        @asynccontextmanager
        async def start_circular(words: Words) -> AsyncIterator[Letters]:
            yield Alphabet()

        @asynccontextmanager
        async def start_wrong() -> AsyncIterator[Letters]:
            yield Dictionary(None)  # type: ignore[misc]

        @asynccontextmanager
        async def start_slow() -> AsyncIterator[Letters]:
            self.tried.set()
            try:
                await asyncio.Event().wait()
                yield Alphabet()
            finally:
                self.events.append("slow left")

        @asynccontextmanager
        async def start_raising(config: Raising) -> AsyncIterator[Letters]:
            if config.what == "exit":
                raise SystemExit
            if config.what == "cancelled":
                raise asyncio.CancelledError
            yield Alphabet()

        @asynccontextmanager
        async def start_swallowing() -> AsyncIterator[Letters]:
            with suppress(Exception):
                yield Dictionary(None)  # type: ignore[misc]

        @asynccontextmanager
        async def start_fragile() -> AsyncIterator[Letters]:
            self.attempts += 1
            async with asyncio.TaskGroup() as group:
                group.create_task(self.breaks(self.attempts))
                yield Alphabet()

        @asynccontextmanager
        async def start_stored_apart(database: Database) -> AsyncIterator[Letters]:
            yield Alphabet()

        @asynccontextmanager
        async def start_face(config: Flaky, letters: Letters) -> AsyncIterator[Any]:
            if config.failures:
                raise OSError("no face")
            yield "the router"
            raise OSError("the face does not stop")

        @hookimpl
        def llama_stack_faces() -> Any:
            yield FaceSpec(name="face", config=Flaky, start=start_face)

        @hookimpl
        def llama_stack_apis() -> Any:
            yield ApiSpec(api=Letters)
            yield ApiSpec(api=Words)

        @hookimpl
        def llama_stack_providers() -> Any:
            yield ProviderSpec(api=Letters, name="alphabet", config=Flaky, start=start_alphabet)
            yield ProviderSpec(api=Letters, name="stored", start=start_stored)
            yield ProviderSpec(api=Letters, name="circular", start=start_circular)
            yield ProviderSpec(api=Letters, name="wrong", start=start_wrong)
            yield ProviderSpec(api=Letters, name="slow", start=start_slow)
            yield ProviderSpec(api=Letters, name="raising", config=Raising, start=start_raising)
            yield ProviderSpec(api=Letters, name="swallowing", start=start_swallowing)
            yield ProviderSpec(api=Letters, name="fragile", start=start_fragile)
            yield ProviderSpec(api=Letters, name="apart", start=start_stored_apart)
            yield ProviderSpec(api=Words, name="dictionary", start=start_dictionary)
            yield ProviderSpec(api=Words, name="alone", start=start_alone)

        return SimpleNamespace(
            llama_stack_apis=llama_stack_apis,
            llama_stack_providers=llama_stack_providers,
            llama_stack_faces=llama_stack_faces,
        )

    async def breaks(self, attempt: int) -> None:
        if attempt == 1:
            await self.may_break.wait()
            raise OSError("secret: the engine is gone")

    def stack(self, folder: Path, *, faces: Sequence[Any] = (), **providers: Any) -> Stack:
        entries = {
            api: [
                e if isinstance(e, dict) else {"provider": e} for e in (named if isinstance(named, list) else [named])
            ]
            for api, named in providers.items()
        }
        keys = {"version": 1, "name": "test", "providers": entries, "faces": faces}
        distribution = Distribution.model_validate(keys)
        plugins = [plugin for plugin in discover([self.plugin()]) if plugin.entry is None]
        return Stack(distribution, Registry(plugins), state_folder=folder)


@pytest.fixture
def world() -> World:
    return World()


async def test_providers_start_after_what_they_need_and_stop_before_it(world: World, tmp_path: Path) -> None:
    """The YAML's order is for people; a provider must find what it needs running, also while it stops."""
    async with running(world.stack(tmp_path, words="dictionary", letters="alphabet")) as stack:
        assert stack.is_ready
        assert await stack.api(Words).next("hat") == "hau"
    assert world.events == ["alphabet up", "dictionary up", "dictionary down", "alphabet down"]


async def test_an_api_can_be_held_before_its_provider_runs(world: World, tmp_path: Path) -> None:
    """The server builds its routes first; until the provider is up a call says that it is starting."""
    stack = world.stack(tmp_path, letters="alphabet")
    letters = stack.api(Letters)
    with pytest.raises(UnavailableError, match="is starting"):
        await letters.next("a")
    async with running(stack):
        assert await letters.next("a") == "b"
    with pytest.raises(UnavailableError, match="is stopped"):
        await letters.next("a")


async def test_a_required_provider_that_fails_stops_the_start_with_its_reason(world: World, tmp_path: Path) -> None:
    """What was started before it is stopped again."""
    stack = world.stack(tmp_path, words="dictionary", letters={"provider": "alphabet", "config": {"failures": 9}})
    with pytest.raises(ProviderStartError, match="'alphabet' of 'letters' did not start: OSError: secret path"):
        async with running(stack):
            pytest.fail("the stack must not run")
    assert world.events == []
    assert world.attempts == 1


async def test_an_optional_provider_answers_503_and_is_tried_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One absent back end must not keep the rest from serving, and its exception's text is not for clients."""
    monkeypatch.setattr("llama_stack.stack.FIRST_RETRY_SECONDS", 0.001)
    optional = {"provider": "alphabet", "optional": True, "config": {"failures": 3}}
    stack = world.stack(tmp_path, words="dictionary", letters=optional)
    async with running(stack):
        letters = stack.status()[1]
        assert (letters.state, letters.is_optional) == (State.FAILED, True)
        assert stack.is_ready
        with pytest.raises(ProviderUnavailableError) as refused:
            await stack.api(Words).next("hat")
        assert "secret" not in refused.value.detail
        world.may_retry.set()
        while world.attempts < 4:
            world.tried.clear()
            await world.tried.wait()
        while stack.status()[1].state is not State.READY:
            await asyncio.sleep(0)
        assert await stack.api(Words).next("hat") == "hau"


async def test_an_optional_need_is_none_where_nothing_serves_it(world: World, tmp_path: Path) -> None:
    """Agents run without a safety provider."""
    async with running(world.stack(tmp_path, words="alone")):
        assert world.events == ["alone with None"]


async def test_a_provider_that_needs_storage_gets_its_own(world: World, tmp_path: Path) -> None:
    """The store opens only when somebody asks, under the distribution's own folder."""
    async with running(world.stack(tmp_path / "state", letters="stored")) as stack:
        assert stack.store is not None
        assert stack.store.healthy
    assert world.events == ["Database"]
    assert (tmp_path / "state" / "store.sqlite").exists()


async def test_a_circle_of_needs_is_named(world: World, tmp_path: Path) -> None:
    """The operator has to know where to break it."""
    stack = world.stack(tmp_path, words="dictionary", letters="circular")
    with pytest.raises(ProviderStartError, match="circle: .*letters/circular"):
        await stack.start()
    await stack.stop()


async def test_a_started_object_that_breaks_its_contract_is_refused(world: World, tmp_path: Path) -> None:
    """Found before the server takes a request, not by the first client."""
    stack = world.stack(tmp_path, letters="wrong")
    with pytest.raises(ProviderStartError) as refused:
        await stack.start()
    assert isinstance(refused.value.__cause__, ContractMismatchError)
    await stack.stop()


async def test_a_start_that_hangs_is_cancelled_by_stop(world: World, tmp_path: Path) -> None:
    """SIGTERM during a long load must end the process."""
    stack = world.stack(tmp_path, letters="slow")
    start = asyncio.create_task(stack.start())
    await world.tried.wait()
    start.cancel()
    await asyncio.wait([start])
    await stack.stop()
    assert world.events == ["slow left"]


@pytest.mark.parametrize(("what", "cause"), [("cancelled", "CancelledError"), ("exit", "SystemExit")])
async def test_whatever_a_start_raises_is_named_as_its_failure(
    what: str, cause: str, world: World, tmp_path: Path
) -> None:
    """A library that lets its own cancellation out, or ends the process, must not hang the start or end it mute."""
    stack = world.stack(tmp_path, letters={"provider": "raising", "config": {"what": what}})
    with pytest.raises(ProviderStartError, match=f"'raising' of 'letters' did not start: {cause}$"):
        async with running(stack):
            pytest.fail("the stack must not run")


async def test_a_start_function_that_catches_everything_cannot_hide_a_broken_contract(
    world: World, tmp_path: Path
) -> None:
    """The contract is checked while the provider is open; its own handlers are none of the check's business."""
    with pytest.raises(ProviderStartError, match="not a subclass|is not"):
        async with running(world.stack(tmp_path, letters="swallowing")):
            pytest.fail("the stack must not run")


async def test_a_provider_that_breaks_down_is_unavailable_and_started_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task group in a start function ends with its first task; the stack must notice, also for a required one."""
    monkeypatch.setattr("llama_stack.stack.FIRST_RETRY_SECONDS", 0.001)
    async with running(world.stack(tmp_path, letters="fragile")) as stack:
        letters = stack.api(Letters)
        assert await letters.next("a") == "b"
        world.may_break.set()
        while stack.is_ready:
            await asyncio.sleep(0)
        with pytest.raises(ProviderUnavailableError, match="not up: it broke down; see the server's log"):
            await letters.next("a")
        while stack.status()[0].state is not State.READY:
            await asyncio.sleep(0.001)
        assert await letters.next("a") == "b"
        assert world.attempts == 2


async def test_an_optional_provider_that_is_slow_to_start_holds_up_nobody(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hung back end would otherwise keep the whole stack from serving, with nothing that names it."""
    monkeypatch.setattr("llama_stack.stack.SLOW_START_SECONDS", 0.01)
    stack = world.stack(tmp_path, letters={"provider": "slow", "optional": True}, words="alone")
    async with running(stack):
        assert stack.is_ready
        assert stack.status()[0].reason == "still starting after 0.01 s"
    assert "slow left" in world.events


async def test_a_required_provider_that_is_slow_to_start_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may take minutes to load, so nothing is given up; the operator reads which provider it is."""
    monkeypatch.setattr("llama_stack.stack.SLOW_START_SECONDS", 0.01)
    stack = world.stack(tmp_path, letters="slow")
    start = asyncio.create_task(stack.start())
    while stack.status()[0].reason != "still starting after 0.02 s":
        await asyncio.sleep(0)
    assert (stack.status()[0].state, stack.is_ready) == (State.STARTING, False)
    start.cancel()
    await asyncio.wait([start])
    await stack.stop()


async def test_an_optional_provider_waits_for_its_store_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is down at the start is one reason more for a provider to be optional."""
    monkeypatch.setattr("llama_stack.stack.FIRST_RETRY_SECONDS", 0.001)
    (tmp_path / "state").write_text("a file where the folder belongs")
    optional = {"provider": "apart", "optional": True}
    async with running(world.stack(tmp_path / "state", letters=optional, words="alone")) as stack:
        assert stack.status()[0].reason == "store cannot be used; see the server's log"
        assert stack.is_ready
        (tmp_path / "state").unlink()
        while stack.status()[0].state is not State.READY:
            await asyncio.sleep(0.001)


async def test_providers_that_do_not_say_what_they_own_cannot_share_an_api(world: World, tmp_path: Path) -> None:
    """Which of the two a request means could not be told; better at the start than by 501 to every request."""
    with pytest.raises(ProviderStartError, match="owns is missing"):
        async with running(world.stack(tmp_path, letters=["alphabet", "stored"])):
            pytest.fail("the stack must not run")


async def test_a_face_that_does_not_start_is_named(world: World, tmp_path: Path) -> None:
    """The operator asked for it by name."""
    face = {"face": "face", "config": {"failures": 1}}
    with pytest.raises(ProviderStartError, match="^face 'face' did not start: OSError: no face$"):
        async with running(world.stack(tmp_path, faces=[face], letters="alphabet")):
            pytest.fail("the stack must not run")
    assert world.events == ["alphabet up", "alphabet down"]


async def test_a_face_that_does_not_stop_keeps_no_provider_from_stopping(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A provider may have state to write at its end."""
    async with running(world.stack(tmp_path, faces=[{"face": "face"}], letters="alphabet")) as stack:
        assert stack.faces == {"face": "the router"}
    assert world.events == ["alphabet up", "alphabet down"]
    assert "face 'face' failed to stop" in caplog.text


async def test_a_store_that_fails_is_told_to_whoever_runs_the_stack(world: World, tmp_path: Path) -> None:
    """After a failed sync only a restart can tell what the disk holds, so the process has to end."""
    async with running(world.stack(tmp_path, letters="stored")) as stack:
        failed = asyncio.create_task(stack.failed())
        await asyncio.sleep(0)
        assert not failed.done()
        assert stack.store is not None
        health = stack.store._health
        health.fail("the disk failed")
        health.fail("and again")
        await failed
        assert not stack.is_ready
        assert stack.store.fault == "the disk failed"


async def test_settings_that_the_check_takes_start(tmp_path: Path) -> None:
    """A distribution without faults must not end in a traceback, however strict a plugin is with its own fields."""

    @asynccontextmanager
    async def start(config: Exact) -> AsyncIterator[Letters]:
        assert config == Exact(letters=("a", "b"), folder=Path("/tmp"))
        yield Alphabet()

    @hookimpl
    def llama_stack_providers() -> Any:
        yield ProviderSpec(api=Letters, name="exact", config=Exact, start=start)

    plugin = SimpleNamespace(
        llama_stack_providers=llama_stack_providers, llama_stack_apis=hookimpl(lambda: [ApiSpec(api=Letters)])
    )
    file = tmp_path / "exact.yaml"
    file.write_text(
        "version: 1\nname: exact\nproviders:\n  letters:\n"
        "    - { provider: exact, config: { letters: [a, b], folder: /tmp } }\n"
    )
    registry = Registry([found for found in discover([plugin]) if found.entry is None])
    async with running(Stack(load_distribution(file, environ={}, registry=registry), registry)) as stack:
        assert await stack.api(Letters).next("a") == "b"


async def test_an_api_that_the_distribution_does_not_name_is_unavailable(world: World, tmp_path: Path) -> None:
    """The catalogue of models is always there; everything else is what the YAML says."""
    stack = world.stack(tmp_path, letters="alphabet")
    assert stack.apis == (Letters, Models)
    with pytest.raises(NotProvidedError, match="serves no 'words'"):
        stack.api(Words)
