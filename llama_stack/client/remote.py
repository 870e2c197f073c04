"""A contract implemented over HTTP, read off its operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, TypeVar, cast

from ..apis import Inference, Models, RewardScoring
from ..apis.contract import Api, Operation, contract_of, operations
from ..apis.models import ModelKind, ServedModel
from ..errors import NotProvidedError
from .connection import Connection

A = TypeVar("A", bound=Api)

_KINDS: Mapping[type[Api], frozenset[ModelKind]] = {
    Inference: frozenset({ModelKind.LLM, ModelKind.EMBEDDING}),
    RewardScoring: frozenset({ModelKind.REWARD}),
}
"""Which of the models in the catalogue each API that serves models means."""


class RemoteApis:
    """The APIs of one server. Which of them it serves shows when they are called."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def api(self, contract: type[A]) -> A:
        """An implementation of the contract that sends every operation to the server.

        Of the methods that are no operations, ``models`` asks the server's catalogue, and one that the contract
        implements by others does so here. Any other raises ``NotProvidedError``, for no request could answer it.
        """
        return cast(A, _implementation(contract_of(contract))(self._connection))


@cache
def _implementation(contract: type[Api]) -> Callable[[Connection], Api]:
    sent = {operation.name: _sent(operation) for operation in operations(contract)}
    rest = {name: _unsent(contract, name) for name in contract.__abstractmethods__ - sent.keys()}
    return type(f"Remote{contract.__name__}", (contract,), {"__init__": _remember, **sent, **rest})


def _remember(self: Any, connection: Connection) -> None:
    self._connection = connection


def _sent(operation: Operation) -> Callable[..., Any]:
    method = inspect.unwrap(getattr(operation.api, operation.name))
    signature = inspect.signature(method)

    @wraps(method, updated=())  # without the marks that make it an operation of a contract, and abstract
    async def send(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return await self._connection.call(operation, bound.arguments)

    return send


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
