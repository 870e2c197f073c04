"""A running distribution: starts its providers in the order of their needs, and stops them in reverse.

Each provider, and each face, lives in a task of its own that enters its start function, waits, and leaves it, so that
whatever it opened is closed by the task that opened it. A required provider that does not start stops the whole start;
an optional one leaves its API answering 503 with the reason and is tried again in the background, as is any provider
that breaks down later. Which provider serves a request is ``routing``'s; HTTP is ``server``'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .apis.contract import Api
from .apis.models import Models
from .distribution import Distribution
from .errors import (
    CheckpointError,
    ContractMismatchError,
    NotProvidedError,
    ProviderStartError,
    ProviderUnavailableError,
    StackError,
    StoreError,
    StoreUnavailableError,
    UnavailableError,
    listed,
)
from .inner import Inner, inner_providers
from .plugins import FaceSpec, ProviderSpec, ToolSpec
from .registry import Need, NeedKind, Registry, check_provider, needs
from .routing import ModelCatalog, route
from .tools import Permission, Tools, ToolSource

if TYPE_CHECKING:
    from .storage import Store

A = TypeVar("A", bound=Api)
T = TypeVar("T")

_SILENT: str | None = "it fails to say whether it is ready; see the server's log"
logger = logging.getLogger("llama_stack.stack")

FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0

SLOW_START_SECONDS = 30.0
"""How long an optional provider is waited for, and how often it is said that a required one is still starting."""


class State(StrEnum):
    """Where a provider stands."""

    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    """Up, and for now unable to serve, as it says itself."""
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ProviderStatus:
    """A provider of the distribution, as readiness and ``/providers/list`` show it."""

    api: str
    provider: str
    id: str
    plugin: str
    is_optional: bool
    state: State
    reason: str | None
    start_seconds: float | None
    details: Mapping[str, str] | None
    """What the provider itself adds, while it is up."""


@dataclass(eq=False)
class Instance:
    """One provider, tool or face of the distribution: what it is to be started with, and where it stands."""

    spec: ProviderSpec | ToolSpec | FaceSpec
    plugin: str
    id: str
    config: Any
    is_optional: bool = False
    is_alone: bool = True
    """Whether no other provider of the distribution serves the same API."""
    inner: tuple[Instance, ...] = ()
    """The providers that it starts itself, which its config names."""
    permissions: frozenset[Permission] = frozenset()
    """What a tool may touch."""
    timeout_seconds: float | None = None
    """How long a call of a tool may take, where the distribution says so."""
    state: State = State.STARTING
    reason: str | None = None
    start_seconds: float | None = None
    started: Any = None
    """What the start function yielded, while it is up."""
    error: BaseException | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the first attempt to start has ended, either way."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def api(self) -> type[Api] | None:
        """The API that it provides, or ``None`` for a tool or a face."""
        return self.spec.api if isinstance(self.spec, ProviderSpec) else None

    @property
    def section(self) -> str:
        """Where the YAML lists it: the name of its API, ``tools``, or ``faces``."""
        return self.api.name if self.api else "tools" if isinstance(self.spec, ToolSpec) else "faces"

    @property
    def label(self) -> str:
        """``inference/local``: the instance's name to people; with a dot, the owner of its tables."""
        return f"{self.section}/{self.id}"

    @property
    def is_running(self) -> bool:
        return self.started is not None

    def needs(self) -> Iterator[Need]:
        """What it asks for, and what those behind it ask for."""
        yield from needs(self.spec.start)
        for instance in self.inner:
            yield from instance.needs()

    def running(self) -> Any:
        """The provider's own object. Raises ``UnavailableError`` with the reason while there is none."""
        if self.started is not None:
            return self.started
        if self.state is State.FAILED:
            raise ProviderUnavailableError(f"{self} is not up: {self.reason}", retry_after_seconds=5)
        raise UnavailableError(f"{self} is {self.state.value}")

    def __str__(self) -> str:
        return f"provider {self.id!r} of {self.section!r}" if self.api else f"{self.section[:-1]} {self.id!r}"

    @property
    def status(self) -> ProviderStatus:
        state, reason, details = self.state, self.reason, None
        if state is State.READY and isinstance(self.started, Api):
            reason = _said(self, self.started.unready_reason, _SILENT)
            state = State.READY if reason is None else State.RECOVERING
            details = _said(self, self.started.readiness_details, None) or None
        elif state is State.READY and isinstance(self.started, ToolSource):
            asked = {"permissions": ", ".join(_asked(self))} if _asked(self) else {}
            details = {**asked, **_said(self, self.started.readiness_details, {})} or None
        return ProviderStatus(
            self.section,
            self.spec.name,
            self.id,
            self.plugin,
            self.is_optional,
            state,
            reason,
            self.start_seconds,
            details,
        )


class Stack:
    """The providers of one distribution and the APIs that they serve together. It is started once.

    ``api`` may be called, and its result held, before ``start``: calls are answered 503 until their provider is up.
    """

    def __init__(
        self,
        distribution: Distribution,
        registry: Registry,
        *,
        state_folder: Path | None = None,
        lock: str | None = None,
    ) -> None:
        """``state_folder`` holds the store; by default the distribution's folder under ``LLAMA_STACK_HOME``.

        ``lock`` is the digest of the lock that this start was held to, for ``/version``.
        """
        self.distribution = distribution
        self.registry = registry
        self.lock = lock
        self.state_folder = state_folder or home() / distribution.name
        self.store: Store | None = None
        """Open once a provider that needs it is about to start."""
        by_api: dict[type[Api], list[Instance]] = {}
        for name, entries in distribution.providers.items():
            for entry in entries:
                api = registry.api(name)
                instance = _instance(registry, api, entry.provider, entry.id or entry.provider, entry.config)
                instance.is_optional, instance.is_alone = entry.optional, len(entries) == 1
                by_api.setdefault(api, []).append(instance)
        self._providers = [instance for instances in by_api.values() for instance in instances]
        self._tools: list[Instance] = []
        for tool in distribution.tools:
            declared = registry.tool(tool.tool)
            config = declared.spec.config.read(tool.config)
            label = declared.plugin.label
            id = tool.id or tool.tool
            self._tools.append(
                Instance(
                    declared.spec,
                    label,
                    id,
                    config,
                    is_optional=tool.optional,
                    permissions=frozenset(tool.permissions),
                    timeout_seconds=tool.timeout_seconds,
                )
            )
        self._faces: list[Instance] = []
        for face in distribution.faces:
            installed = registry.face(face.face)
            config = installed.spec.config.read(face.config)
            self._faces.append(Instance(installed.spec, installed.plugin.label, face.face, config))
        self._routed: dict[type[Api], Api] = {api: route(api, instances) for api, instances in by_api.items()}
        self._routed.setdefault(Models, ModelCatalog(self._providers))
        self._is_started = False
        self._tasks: list[tuple[Instance, asyncio.Task[None]]] = []
        self._opening = asyncio.Lock()
        self._opened = AsyncExitStack()
        self._store_failed = asyncio.Event()

    @property
    def apis(self) -> tuple[type[Api], ...]:
        """The contracts that this stack serves."""
        return tuple(self._routed)

    def api(self, contract: type[A]) -> A:
        """The API as all its providers serve it together. Raises ``NotProvidedError`` where the YAML names none."""
        routed = self._routed.get(contract)
        if routed is None:
            raise NotProvidedError(f"distribution {self.distribution.name!r} serves no {contract.name!r}")
        return cast(A, routed)

    @property
    def faces(self) -> dict[str, Any]:
        """The routers of the faces that are up, by name."""
        return {instance.id: instance.started for instance in self._faces if instance.is_running}

    @property
    def providers(self) -> list[tuple[ProviderStatus, Api]]:
        """The providers that are up, each with its own object, in the order of the YAML."""
        return [(instance.status, instance.started) for instance in self._providers if instance.is_running]

    @property
    def is_ready(self) -> bool:
        """Whether every required provider can serve, every optional one has had its try, and the store takes writes."""
        return (
            self._is_started
            and all(
                status.state is State.READY or (status.is_optional and status.state in (State.RECOVERING, State.FAILED))
                for status in self.status()
            )
            and (self.store is None or self.store.healthy)
        )

    def status(self) -> list[ProviderStatus]:
        """Every provider and tool and where it stands, in the order of the YAML."""
        return [instance.status for instance in [*self._providers, *self._tools]]

    async def failed(self) -> None:
        """Wait until the store has failed for good: from then on only a restart can tell what the disk holds."""
        await self._store_failed.wait()

    async def start(self) -> None:
        """Start all providers, then the faces. Raises ``ProviderStartError`` for what is required and does not start.

        After an error, and at the end, call ``stop``.
        """
        for instance in [*start_order([*self._tools, *self._providers]), *self._faces]:
            task = asyncio.create_task(self._run(instance), name=instance.label)
            self._tasks.append((instance, task))
            await _first_try(instance)
            if instance.error is not None and not instance.is_optional:
                cause = _cause(instance.error)
                raise ProviderStartError(f"{instance} did not start: {cause}") from instance.error
        self._is_started = True

    async def stop(self) -> None:
        """Stop the faces, then every provider in the reverse of the order of their start, then close the store."""
        self._is_started = False
        while self._tasks:
            instance, task = self._tasks[-1]
            instance.stopping.set()
            if not instance.is_running:  # still starting, or waiting for its next try
                task.cancel()
            instance.started, instance.state = None, State.STOPPED
            await asyncio.wait([task])
            self._tasks.pop()
            if not task.cancelled() and task.exception():
                logger.error("%s failed to stop", instance, exc_info=task.exception())
        await self._opened.aclose()
        self.store = None

    async def _run(self, instance: Instance) -> None:
        """Hold a provider or face open until it is told to stop, and try again after a failure that ends no start."""
        retry_seconds = FIRST_RETRY_SECONDS
        while True:
            try:
                return await self._hold(instance)
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                if instance.stopping.is_set() or (isinstance(error, asyncio.CancelledError) and _is_cancelled()):
                    raise
                was_up, is_first = instance.is_running, not instance.settled.is_set()
                what = "broke down" if was_up else "did not start"
                instance.started, instance.state, instance.error = None, State.FAILED, error
                instance.reason = _reason(error) or f"it {what}; see the server's log"
                instance.settled.set()
                if is_first and not instance.is_optional:
                    return
                retry_seconds = FIRST_RETRY_SECONDS if was_up else retry_seconds
                trace = None if isinstance(error, StackError) else error
                logger.warning(
                    "%s %s, next try in %g s: %s", instance, what, retry_seconds, _cause(error), exc_info=trace
                )
            await asyncio.sleep(retry_seconds)
            retry_seconds = min(2 * retry_seconds, LONGEST_RETRY_SECONDS)

    async def _hold(self, instance: Instance) -> None:
        began = monotonic()
        _require_permissions(instance)
        arguments = {n.parameter: await self._argument(n, instance) for n in needs(instance.spec.start)}
        mismatch: ContractMismatchError | None = None
        async with instance.spec.start(**arguments) as started:
            # not raised in here: a start function that catches what is thrown at its yield would hide it
            mismatch = _mismatch(instance, started)
            if mismatch is None:
                instance.started, instance.state, instance.reason = started, State.READY, None
                instance.start_seconds = monotonic() - began
                instance.settled.set()
                await instance.stopping.wait()
        if not instance.stopping.is_set():
            raise mismatch or RuntimeError("its start function ended by itself")

    async def _argument(self, need: Need, instance: Instance) -> Any:
        if need.kind is NeedKind.CONFIG:
            return instance.config
        if need.kind is NeedKind.API:
            assert need.api is not None
            return self._routed.get(need.api) if need.is_optional else self.api(need.api)
        if need.kind is NeedKind.TOOLS:
            return Tools(self._tools)
        if need.kind is NeedKind.INNER:
            return Inner({inner.id: partial(self._started_inside, instance, inner) for inner in instance.inner})
        store = await self._opened_store()
        owner = instance.label.replace("/", ".")
        if need.kind is NeedKind.FOLDER:
            return await store.folder(owner)
        return store.database(owner) if need.kind is NeedKind.DATABASE else store.blobs(owner)

    @asynccontextmanager
    async def _started_inside(self, outer: Instance, inner: Instance) -> AsyncIterator[Api]:
        owner = replace(inner, id=f"{outer.id}.{inner.id}")  # of its tables: another one may be called the same
        arguments = {n.parameter: await self._argument(n, owner) for n in needs(inner.spec.start)}
        async with inner.spec.start(**arguments) as started:
            if (mismatch := _mismatch(inner, started)) is not None:
                raise mismatch
            yield started

    async def _opened_store(self) -> Store:
        async with self._opening:  # several providers may try again at once
            if self.store is None:
                from .storage import open_store  # SQLAlchemy loads only when something is to be stored

                url = self.distribution.storage.url
                opening = open_store(url, self.state_folder, on_failure=self._note_failure)
                self.store = await self._opened.enter_async_context(opening)
            return self.store

    def _note_failure(self, reason: str) -> None:
        logger.critical("the store failed: %s", reason)
        self._store_failed.set()


@asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[Stack]:
    """Start a stack for the length of a block."""
    try:
        await stack.start()
        yield stack
    finally:
        await stack.stop()


def home() -> Path:
    """The folder that holds a folder a distribution: ``LLAMA_STACK_HOME``, by default ``~/.llama-stack``."""
    return Path(os.environ.get("LLAMA_STACK_HOME") or Path.home() / ".llama-stack")


def start_order(instances: Sequence[Instance]) -> list[Instance]:
    """The instances, each after those that it needs. Raises ``ProviderStartError`` naming a cycle."""
    graph = {i: [other for other in instances if _comes_before(other, i)] for i in instances}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = " -> ".join(instance.label for instance in reversed(error.args[1]))
        what = f"providers need one another in a circle: {circle}; break it at one of them"
        raise ProviderStartError(what) from error


def _comes_before(other: Instance, instance: Instance) -> bool:
    if other.api is None:
        return any(need.kind is NeedKind.TOOLS for need in instance.needs())
    return any(need.api is other.api for need in instance.needs())


def _instance(registry: Registry, api: type[Api], provider: str, id: str, values: Mapping[str, Any]) -> Instance:
    """A provider of the API with its config, and those behind it."""
    found = registry.provider(api, provider)
    config = found.spec.config.read(values)
    inner = tuple(_instance(registry, api, each.provider, each.name, each.config) for each in inner_providers(config))
    return Instance(found.spec, found.plugin.label, id, config, inner=inner)


async def _first_try(instance: Instance) -> None:
    """Wait for the first attempt, and say so while it takes long; an optional provider is not waited for any longer."""
    waited_seconds = 0.0
    while not instance.settled.is_set():
        try:
            async with asyncio.timeout(SLOW_START_SECONDS):
                await instance.settled.wait()
        except TimeoutError:
            waited_seconds += SLOW_START_SECONDS
            instance.reason = f"still starting after {waited_seconds:g} s"
            logger.warning("%s is %s", instance, instance.reason)
            if instance.is_optional:
                instance.state = State.FAILED
                return


def _require_permissions(instance: Instance) -> None:
    """Raises ``ProviderStartError`` for a tool that asks for more than its entry permits; ``check`` says it first."""
    asked = _asked(instance)
    if missing := [permission.value for permission in asked if permission not in instance.permissions]:
        what = f"it asks for {listed(missing)}, which its entry does not permit; "
        raise ProviderStartError(what + f"write 'permissions: [{', '.join(asked)}]'")
    for permission, of in asked.items():
        logger.info("%s may touch %s: %s", instance, permission.value, ", ".join(of))


def _asked(instance: Instance) -> Mapping[Permission, Sequence[str]]:
    return instance.spec.asked(instance.config) if isinstance(instance.spec, ToolSpec) else {}


def _mismatch(instance: Instance, started: object) -> ContractMismatchError | None:
    if isinstance(instance.spec, ProviderSpec):
        try:
            check_provider(instance.spec, started, is_alone=instance.is_alone)
        except ContractMismatchError as error:
            return error
    if isinstance(instance.spec, ToolSpec) and not isinstance(started, ToolSource):
        return ContractMismatchError(
            instance.spec.name, [f"it yields {type(started).__name__}, not a subclass of Tool or ToolSource"]
        )
    return None


def _said(instance: Instance, ask: Callable[[], T], otherwise: T) -> T:
    try:
        return ask()
    except Exception:  # a provider's fault must not hide how the others are
        logger.exception("%s failed to say how it is", instance)
        return otherwise


def _is_cancelled() -> bool:
    """Whether somebody cancelled this task, other than a library that let its own cancellation out."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _reason(error: BaseException) -> str | None:
    """What clients read of it. Paths and hosts, which errors about checkpoints and stores name, are the operator's."""
    if isinstance(error, CheckpointError | StoreError | StoreUnavailableError):
        return f"{error.title.lower()}; see the server's log"
    return error.detail if isinstance(error, StackError) else None


def _cause(error: BaseException) -> str:
    """What the operator reads of it."""
    return error.detail if isinstance(error, StackError) else f"{type(error).__name__}: {error}".removesuffix(": ")
