"""One API, one or more providers: an object that implements the contract and forwards by the resource a request names.

``route`` returns it as soon as the distribution is read, before any provider runs: a call that reaches a provider which
is not up is answered 503 with the reason. Providers and faces hold this object and never each other's.

With one provider a call is forwarded as it stands. With several, a request that names a resource goes to the provider
that owns it; one that creates a resource goes to the provider that already owns that id, or else to the first one; a
list (a ``GET`` of lines) is the lists of all providers joined; and anything else goes to the first.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

from .apis.contract import Api, Operation, Shape, operations, other_methods
from .apis.models import Models, ServedModel
from .errors import AlreadyExistsError, ModelNotFoundError, NotFoundError, StackError

A = TypeVar("A", bound=Api)


class Backend(Protocol):
    """A provider of the distribution, running or not."""

    id: str

    @property
    def is_running(self) -> bool: ...

    def running(self) -> Api:
        """The provider's own object. Raises ``ProviderUnavailableError`` with the reason while there is none."""
        ...


def route(contract: type[A], backends: Sequence[Backend]) -> A:
    """An implementation of ``contract`` over these providers; at least one is given."""
    forwards = {op.name: _single(op.name) if len(backends) == 1 else _dispatch(op) for op in operations(contract)}
    for name in other_methods(contract):
        forwards[name] = _single(name) if len(backends) == 1 else _joined(name)
    for name, forward in forwards.items():
        forward.__name__ = name
        forward.__doc__ = getattr(contract, name).__doc__
    routed = type(f"Routed{contract.__name__}", (contract,), {**forwards, "_backends": tuple(backends)})
    return cast(A, routed())


class ModelCatalog(Models):
    """What every provider that serves models serves now."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._backends = tuple(backends)

    async def list_models(self) -> AsyncIterator[ServedModel]:
        """All models, sorted by name; providers that are not up have none."""
        found: list[ServedModel] = []
        for backend in self._backends:
            if backend.is_running:
                models: Callable[[], Awaitable[list[ServedModel]]] | None = getattr(backend.running(), "models", None)
                if models is not None:
                    found += [m.model_copy(update={"provider_id": backend.id}) for m in await models()]
        return _each(sorted(found, key=lambda model: model.model))


def _single(name: str) -> Callable[..., Any]:
    async def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self._backends[0].running(), name)(*args, **kwargs)

    return forward


def _joined(name: str) -> Callable[..., Any]:
    """Ask every provider that is up: lists are joined, booleans are true when one is."""

    async def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        answers = [await getattr(b.running(), name)(*args, **kwargs) for b in self._backends if b.is_running]
        if answers and isinstance(answers[0], bool):
            return any(answers)
        return [item for answer in answers for item in answer]

    return forward


def _dispatch(operation: Operation) -> Callable[..., Any]:
    async def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        backends: Sequence[Backend] = self._backends
        arguments = operation.signature.bind(self, *args, **kwargs).arguments
        resource = operation.resource_of(arguments)
        if resource is None and operation.shape is Shape.LINES and operation.method == "GET":
            # each is asked before the first line: a list that ends early would look whole
            providers = [backend.running() for backend in backends]
            return _chained([await getattr(provider, operation.name)(*args, **kwargs) for provider in providers])
        if resource is None:
            return await getattr(backends[0].running(), operation.name)(*args, **kwargs)
        owner = await _owner(operation, resource, backends)
        new_name = operation.new_name_of(arguments)
        if new_name is not None:
            await _refuse_taken(operation, new_name, owner, backends)
        return await getattr(owner, operation.name)(*args, **kwargs)

    return forward


async def _owner(operation: Operation, resource: str, backends: Sequence[Backend]) -> Api:
    silent: StackError | None = None
    for backend in backends:
        try:
            provider = backend.running()
            if await provider.owns(resource):
                return provider
        except StackError as error:  # it is down, or what stands behind it is; another may still own the resource
            silent = silent or error
    if silent is not None:  # the resource may be theirs: "unavailable" is true, "not found" might not be
        raise silent
    if operation.creates:
        return backends[0].running()
    if operation.resource == "model":
        served: list[ServedModel] = []
        for backend in backends:
            served += await cast(Any, backend.running()).models()
        raise ModelNotFoundError(resource, [model.model for model in served])
    word = (operation.resource or "").split(".")[-1]
    raise NotFoundError(f"{word} {resource!r} does not exist here", param=word)


async def _refuse_taken(operation: Operation, name: str, owner: Api, backends: Sequence[Backend]) -> None:
    """Raise ``AlreadyExistsError`` where another provider than ``owner`` has something of that name."""
    for backend in backends:
        provider = backend.running()
        if provider is not owner and await provider.owns(name):
            word = (operation.resource or "").split(".")[-1]
            raise AlreadyExistsError(word, name, param=operation.names or word)


async def _chained(lists: Iterable[AsyncIterator[Any]]) -> AsyncIterator[Any]:
    for items in lists:
        async for item in items:
            yield item


async def _each(items: Iterable[ServedModel]) -> AsyncIterator[ServedModel]:
    for item in items:
        yield item
