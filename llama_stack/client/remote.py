"""A contract implemented over HTTP, read off its operations."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import cache, wraps
from typing import Any, TypeVar, cast

from ..apis import AgenticSystem, Datasets, Inference, MemoryBanks, Models, PostTraining, RewardScoring
from ..apis.contract import Api, Operation, contract_of, operations
from ..apis.models import ModelKind, ServedModel
from ..errors import NotFoundError, NotProvidedError
from .connection import Connection

A = TypeVar("A", bound=Api)

_KINDS: Mapping[type[Api], frozenset[ModelKind]] = {
    Inference: frozenset({ModelKind.LLM, ModelKind.EMBEDDING}),
    RewardScoring: frozenset({ModelKind.REWARD}),
}
"""Which of the models in the catalogue each API that serves models means."""


async def _owns_agent(api: AgenticSystem, resource: str) -> bool:
    return any([found.agent.uuid == resource async for found in await api.list_agents()])


async def _owns_bank(api: MemoryBanks, resource: str) -> bool:
    return any([bank.uuid == resource async for bank in await api.list_banks()])


async def _owns_dataset(api: Datasets, resource: str) -> bool:
    try:
        await api.get_dataset(resource)
    except NotFoundError:
        return False
    return True


async def _owns_job(api: PostTraining, resource: str) -> bool:
    try:
        await api.job_status(resource)
    except NotFoundError:
        return False
    return True


_OWNS: Mapping[type[Api], Callable[[Any, str], Awaitable[bool]]] = {
    AgenticSystem: _owns_agent,
    Datasets: _owns_dataset,
    MemoryBanks: _owns_bank,
    PostTraining: _owns_job,
}
"""How to find out by the operations of a contract whether the server holds a resource."""


class RemoteApis:
    """The APIs of one server. Which of them it serves shows when they are called."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def api(self, contract: type[A]) -> A:
        """An implementation of the contract that sends every operation to the server.

        Of the methods that are no operations, ``models`` asks the server's catalogue, ``owns`` asks the server by the
        contract's own operations, and one that the contract implements by others does so here. Any other raises
        ``NotProvidedError``, for no request could answer it.
        """
        return cast(A, _implementation(contract_of(contract))(self._connection))


@cache
def _implementation(contract: type[Api]) -> Callable[[Connection], Api]:
    sent = {operation.name: _sent(operation) for operation in operations(contract)}
    rest = {name: _unsent(contract, name) for name in contract.__abstractmethods__ - sent.keys()}
    if contract in _OWNS:
        rest["owns"] = _owns(contract)
    return type(f"Remote{contract.__name__}", (contract,), {"__init__": _remember, **sent, **rest})


def _remember(self: Any, connection: Connection) -> None:
    self._connection = connection


def _sent(operation: Operation) -> Callable[..., Any]:
    method = inspect.unwrap(getattr(operation.api, operation.name))

    @wraps(method, updated=())  # without the marks that make it an operation of a contract, and abstract
    async def send(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = operation.signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return await self._connection.call(operation, bound.arguments)

    return send


def _owns(contract: type[Api]) -> Callable[..., Any]:
    @wraps(contract.owns, updated=())
    async def owns(self: Any, resource: str) -> bool:
        return await _OWNS[contract](self, resource)

    return owns


def _unsent(contract: type[Api], name: str) -> Callable[..., Any]:
    method = getattr(contract, name)
    if name == "models" and contract in _KINDS:

        @wraps(method, updated=())
        async def models(self: Any) -> list[ServedModel]:
            listed = await RemoteApis(self._connection).api(Models).list_models()
            return [model async for model in listed if model.kind in _KINDS[contract]]

        return models

    @wraps(method, updated=())
    async def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotProvidedError(f"{contract.__name__}.{name} cannot be asked over HTTP: it is no operation of the API")

    return refuse
