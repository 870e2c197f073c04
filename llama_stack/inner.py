"""Providers behind a provider: what stands before others of its API names them in its config and starts them itself.

They are started, checked and given what they need like any provider of a distribution, and nobody else reaches them: a
``fallback`` before two remote servers is one provider to the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from .apis.config import Config, InnerProvider
from .apis.contract import Api

StartInner = Callable[[], AbstractAsyncContextManager[Api]]


def inner_providers(config: Config) -> list[InnerProvider]:
    """The providers that a config names, field by field."""
    found: list[InnerProvider] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        found += [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, InnerProvider)]
    return found


class Inner:
    """What a start function takes to start the providers that its config names."""

    def __init__(self, starts: Mapping[str, StartInner]) -> None:
        self._starts = dict(starts)

    def start(self, entry: InnerProvider) -> AbstractAsyncContextManager[Api]:
        """Run the provider for the length of a block, which yields its implementation of the API.

        Raises what its start raises, ``ContractMismatchError`` for one that does not keep its contract.
        """
        return self._starts[entry.name]()
