"""A provider as a subject: a whole stack around it, behind a real server, in a thread of this process."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...apis import APIS, Api
from ...apis.models import ModelKind
from ...client.event_loop import EventLoopThread
from ...distribution import Distribution
from ...plugins import discover, in_folder
from ...registry import Registry
from ...server import listening
from ...stack import Stack, running
from ..stub_inference import stub
from .checks import Outcome, Verdict, checks_for, run_check
from .subject import Subject

Entries = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Target:
    """A provider to be tested, and what stands beside it."""

    api: str
    provider: str
    config: Mapping[str, Any] = field(default_factory=dict)
    beside: Entries = field(default_factory=dict)
    """Providers of other APIs, as a distribution lists them; ``provider: stub`` is inference with fixed answers."""
    tools: Sequence[Mapping[str, Any]] = ()
    plugins: Sequence[object] = ()
    """Plugins in this process, besides those that are installed."""
    plugins_dir: Path | None = None
    """A folder of plugins of one file."""
    model: str | None = None
    """The model to ask, where the provider lists none of its own."""

    def contract(self) -> type[Api]:
        """The contract that it provides. Raises ``NotInstalledError``."""
        known = {api.name: api for api in APIS}
        return known.get(self.api) or self.registry().api(self.api)

    def registry(self) -> Registry:
        """What is installed, with the plugins that are named here."""
        files = [] if self.plugins_dir is None else in_folder(self.plugins_dir)
        return Registry([*discover([stub, *self.plugins]), *files])

    def distribution(self) -> Distribution:
        """A distribution with this provider and those beside it."""
        providers = {api: [dict(entry) for entry in entries] for api, entries in self.beside.items()}
        own = {"provider": self.provider, "config": dict(self.config)}
        providers[self.api] = [own, *providers.get(self.api, [])]
        value = {"version": 1, "name": "conformance", "providers": providers, "tools": [dict(t) for t in self.tools]}
        return Distribution.model_validate(value | {"server": {"port": 0}})

    @asynccontextmanager
    async def serving(self, folder: Path) -> AsyncIterator[str]:
        """The address of a server with its state in ``folder``."""
        stack = Stack(self.distribution(), self.registry(), state_folder=folder)
        async with running(stack), listening(stack) as server:
            yield server.url


@contextmanager
def serving_target(target: Target) -> Iterator[tuple[EventLoopThread, Subject]]:
    """A server around the target in a thread, and a subject of it; both end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="llama-stack-conformance-"))
    thread = EventLoopThread()
    held = _Held(target, folder / "state")
    try:
        subject = thread.run(held.open())
        try:
            yield thread, subject
        finally:
            thread.run(held.close(subject))
    finally:
        thread.close()
        shutil.rmtree(folder, ignore_errors=True)


class _Held:
    """Holds a server open across calls, each of which is a task of its own."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._idle: set[asyncio.Task[Any]] = set()

    async def open(self) -> Subject:
        model, provider = self._target.model, self._target.provider
        models = {ModelKind.LLM: model} if model else None
        subject = Subject(await self._start(), provider=provider, models=models)
        subject.restarter = self._restart
        subject.busy = self._busy
        subject.start_and_stop = self._start_and_stop
        return subject

    async def close(self, subject: Subject) -> None:
        await subject.aclose()
        await self._stop()

    async def _start(self) -> str:
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ending = asyncio.Event()
        self._task = asyncio.create_task(self._serve())  # one task opens and closes everything
        waited: list[asyncio.Future[Any]] = [self._url, self._task]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not self._url.done():
            await self._task
        self._idle = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        return await self._url

    async def _serve(self) -> None:
        async with self._target.serving(self._folder) as url:
            self._url.set_result(url)
            await self._ending.wait()

    async def _stop(self) -> None:
        self._ending.set()
        await self._task

    async def _restart(self) -> str:
        await self._stop()
        return await self._start()

    def _busy(self) -> list[str]:
        others = asyncio.all_tasks() - self._idle - {asyncio.current_task()}
        return sorted(task.get_coro().__qualname__ for task in others if not task.done())  # type: ignore[union-attr]

    async def _start_and_stop(self) -> list[str]:
        """Run a second server twice in a thread of its own; what the second run leaves that the first did not."""
        return await asyncio.to_thread(self._left_behind)

    def _left_behind(self) -> list[str]:
        def once() -> None:
            with tempfile.TemporaryDirectory(prefix="llama-stack-conformance-") as folder:
                asyncio.run(self._briefly(Path(folder)))

        once()  # what is opened once and for all, such as a library's files, is no leak
        before = _resources()
        once()
        after = _resources()
        return [f"{after[kind] - count} {kind}" for kind, count in before.items() if after[kind] > count]

    async def _briefly(self, folder: Path) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._target.serving(folder))
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
        if left:
            names = ", ".join(sorted(task.get_coro().__qualname__ for task in left))  # type: ignore[union-attr]
            raise AssertionError(f"after the stop these tasks go on: {names}")


def _resources() -> dict[str, int]:
    """What a stopped stack must have given back, by kind."""
    found = {"threads": threading.active_count()}
    if Path("/proc/self/fd").is_dir():
        found["open files"] = len(os.listdir("/proc/self/fd"))
        found["child processes"] = sum(len(path.read_text().split()) for path in _children())
    return found


def _children() -> Iterator[Path]:
    yield from (path for path in Path("/proc/self/task").glob("*/children") if path.exists())


def conformance(
    api: str,
    provider: str,
    *,
    config: Mapping[str, Any] | None = None,
    beside: Entries | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    plugins: Sequence[object] = (),
    plugins_dir: Path | None = None,
    model: str | None = None,
) -> Callable[..., None]:
    """A test function with a case for each check of the API; it needs the plugin ``llama_stack.testing.plugin``.

    ``config`` is the provider's own. ``beside`` are the providers of other APIs that it needs, as in a distribution;
    ``plugins`` are objects or modules in this process that count as installed, ``model`` is the one to ask.
    """
    import pytest

    target = Target(api, provider, config or {}, beside or {}, tuple(tools), tuple(plugins), plugins_dir, model)

    @pytest.mark.parametrize("conformance_target", [pytest.param(target, id=provider)], indirect=True, scope="module")
    @pytest.mark.parametrize("conformance_check", checks_for(target.contract()), ids=lambda check: check.name)
    def each(conformance_target: tuple[EventLoopThread, Subject], conformance_check: Any) -> None:
        thread, subject = conformance_target
        outcome: Outcome = thread.run(run_check(conformance_check, subject))
        if outcome.verdict is Verdict.SKIPPED:
            pytest.skip(outcome.reason)
        if outcome.verdict is Verdict.FAILED:
            pytest.fail(f"{conformance_check.rule}\n{outcome.reason}", pytrace=False)

    made: Callable[..., None] = each
    return made
