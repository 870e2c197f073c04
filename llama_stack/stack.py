"""A running distribution: starts its providers in the order of their needs, and stops them in reverse.

Each provider lives in a task of its own that enters its start function, waits, and leaves it, so that whatever the
provider opened is closed by the task that opened it. A required provider that does not start stops the whole start; an
optional one leaves its API answering 503 with the reason and is tried again in the background. Which provider serves a
request is ``routing``'s; HTTP is ``server``'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .apis.contract import Api
from .apis.models import Models
from .distribution import Distribution
from .errors import ProviderStartError, ProviderUnavailableError, StackError, UnavailableError
from .plugins import FaceSpec, ProviderSpec
from .registry import Need, NeedKind, Registry, check_provider, needs
from .routing import ModelCatalog, route

if TYPE_CHECKING:
    from .storage import Store

A = TypeVar("A", bound=Api)
logger = logging.getLogger("llama_stack.stack")

FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0


class State(StrEnum):
    """Where a provider stands."""

    STARTING = "starting"
    READY = "ready"
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


@dataclass(eq=False)
class Instance:
    """One provider of the distribution: what it is to be started with, and where it stands."""

    spec: ProviderSpec
    plugin: str
    id: str
    config: Any
    is_optional: bool
    state: State = State.STARTING
    reason: str | None = None
    start_seconds: float | None = None
    provider: Api | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the first attempt to start has ended, either way."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None

    @property
    def label(self) -> str:
        """``inference/local``: the instance's name to people, and the owner of its tables."""
        return f"{self.spec.api.name}/{self.id}"

    @property
    def is_running(self) -> bool:
        return self.provider is not None

    def running(self) -> Api:
        """The provider's own object. Raises ``UnavailableError`` with the reason while there is none."""
        if self.provider is not None:
            return self.provider
        if self.state is State.FAILED:
            raise ProviderUnavailableError(
                f"provider {self.id!r} of {self.spec.api.name!r} is not up: {self.reason}", retry_after_seconds=5
            )
        raise UnavailableError(f"provider {self.id!r} of {self.spec.api.name!r} is {self.state.value}")

    @property
    def status(self) -> ProviderStatus:
        return ProviderStatus(
            self.spec.api.name,
            self.spec.name,
            self.id,
            self.plugin,
            self.is_optional,
            self.state,
            self.reason,
            self.start_seconds,
        )


class Stack:
    """The providers of one distribution and the APIs that they serve together.

    ``api`` may be called, and its result held, before ``start``: calls are answered 503 until their provider is up.
    """

    def __init__(self, distribution: Distribution, registry: Registry, *, state_folder: Path | None = None) -> None:
        """``state_folder`` holds the store; by default the distribution's folder under ``LLAMA_STACK_HOME``."""
        self.distribution = distribution
        self.registry = registry
        self.state_folder = state_folder or home() / distribution.name
        self.store: Store | None = None
        """Open once a provider that needs it is about to start."""
        self._instances = [
            Instance(
                spec=installed.spec,
                plugin=installed.plugin.label,
                id=entry.id or entry.provider,
                config=installed.spec.config.model_validate(entry.config),
                is_optional=entry.optional,
            )
            for api_name, entries in distribution.providers.items()
            for entry in entries
            for installed in [registry.provider(registry.api(api_name), entry.provider)]
        ]
        by_api: dict[type[Api], list[Instance]] = {}
        for instance in self._instances:
            by_api.setdefault(instance.spec.api, []).append(instance)
        self._routed: dict[type[Api], Api] = {api: route(api, instances) for api, instances in by_api.items()}
        self._routed.setdefault(Models, ModelCatalog(self._instances))
        self.faces: dict[str, Any] = {}
        """The routers of the faces, by name; filled by ``start``."""
        self._tasks: list[tuple[Instance, asyncio.Task[None]]] = []
        self._faces = AsyncExitStack()
        self._opened = AsyncExitStack()

    @property
    def apis(self) -> tuple[type[Api], ...]:
        """The contracts that this stack serves."""
        return tuple(self._routed)

    def api(self, contract: type[A]) -> A:
        """The API as all its providers serve it together. Raises ``UnavailableError`` where the YAML names none."""
        routed = self._routed.get(contract)
        if routed is None:
            raise UnavailableError(f"distribution {self.distribution.name!r} serves no {contract.name!r}")
        return cast(A, routed)

    @property
    def is_ready(self) -> bool:
        """Whether every required provider is up, every optional one has had its try, and the store takes writes."""
        return all(i.state is State.READY or (i.is_optional and i.state is State.FAILED) for i in self._instances) and (
            self.store is None or self.store.healthy
        )

    def status(self) -> list[ProviderStatus]:
        """Every provider and where it stands, in the order of the YAML."""
        return [instance.status for instance in self._instances]

    async def start(self) -> None:
        """Start all providers, then the faces. Raises ``ProviderStartError`` for what is required and does not start.

        After an error, and at the end, call ``stop`` from the same task.
        """
        for instance in start_order(self._instances):
            arguments = await self._arguments(instance.spec, instance.config, instance.label)
            task = asyncio.create_task(_run(instance, arguments), name=f"provider {instance.label}")
            self._tasks.append((instance, task))
            await instance.settled.wait()
            if instance.error is not None and not instance.is_optional:
                raise ProviderStartError(
                    f"provider {instance.spec.name!r} of {instance.spec.api.name!r} did not start: "
                    f"{_cause(instance.error)}"
                ) from instance.error
        for entry in self.distribution.faces:
            spec = self.registry.face(entry.face).spec
            config = spec.config.model_validate(entry.config)
            arguments = await self._arguments(spec, config, f"faces/{spec.name}")
            self.faces[spec.name] = await self._faces.enter_async_context(spec.start(**arguments))

    async def stop(self) -> None:
        """Stop the faces, then every provider in the reverse of the order of their start, then close the store."""
        await self._faces.aclose()
        while self._tasks:
            instance, task = self._tasks.pop()
            instance.stopping.set()
            if not instance.is_running:  # still starting, or waiting for its next try
                task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and task.exception():
                logger.error("provider %s failed to stop", instance.label, exc_info=task.exception())
        await self._opened.aclose()
        self.store = None

    async def _arguments(self, spec: ProviderSpec | FaceSpec, config: Any, label: str) -> dict[str, Any]:
        return {need.parameter: await self._resolve(need, config, label) for need in needs(spec.start)}

    async def _resolve(self, need: Need, config: Any, label: str) -> Any:
        if need.kind is NeedKind.CONFIG:
            return config
        if need.kind is NeedKind.API:
            assert need.api is not None
            return self._routed.get(need.api) if need.is_optional else self.api(need.api)
        store = await self._opened_store()
        owner = label.replace("/", ".")
        return store.database(owner) if need.kind is NeedKind.DATABASE else store.blobs(owner)

    async def _opened_store(self) -> Store:
        if self.store is None:
            from .storage import open_store  # SQLAlchemy loads only when something is to be stored

            url = self.distribution.storage.url
            self.store = await self._opened.enter_async_context(open_store(url, self.state_folder))
        return self.store


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
    by_api: Mapping[type[Api], list[Instance]] = {
        api: [i for i in instances if i.spec.api is api] for api in {i.spec.api for i in instances}
    }
    graph: TopologicalSorter[Instance] = TopologicalSorter()
    for instance in instances:
        needed = [n.api for n in needs(instance.spec.start) if n.kind is NeedKind.API and n.api is not None]
        graph.add(instance, *(other for api in needed for other in by_api.get(api, ())))
    try:
        return list(graph.static_order())
    except CycleError as error:
        circle = " -> ".join(instance.label for instance in error.args[1])
        raise ProviderStartError(f"providers need each other in a circle: {circle}; break it at one of them") from error


async def _run(instance: Instance, arguments: Mapping[str, Any]) -> None:
    """Hold one provider open until its instance is told to stop; try again while an optional one does not start."""
    retry_seconds = FIRST_RETRY_SECONDS
    while not instance.stopping.is_set():
        began = monotonic()
        try:
            async with instance.spec.start(**arguments) as provider:
                check_provider(instance.spec, provider)
                instance.provider, instance.state, instance.reason = provider, State.READY, None
                instance.start_seconds = monotonic() - began
                instance.settled.set()
                await instance.stopping.wait()
                instance.provider, instance.state = None, State.STOPPED
            return
        except Exception as error:
            if instance.stopping.is_set():
                raise
            instance.provider, instance.state, instance.reason = None, State.FAILED, _shown(error)
            instance.error = error
            instance.settled.set()
            if not instance.is_optional:
                return
            logger.warning(
                "optional provider %s did not start, next try in %g s: %s", instance.label, retry_seconds, _cause(error)
            )
        try:
            async with asyncio.timeout(retry_seconds):
                await instance.stopping.wait()
        except TimeoutError:
            retry_seconds = min(2 * retry_seconds, LONGEST_RETRY_SECONDS)


def _shown(error: Exception) -> str:
    """What clients may read of a failed start: our own errors' words, nothing of a stranger's."""
    return error.detail if isinstance(error, StackError) else "it failed to start; the server's log says why"


def _cause(error: BaseException) -> str:
    """What the operator reads of it."""
    return error.detail if isinstance(error, StackError) else f"{type(error).__name__}: {error}"
