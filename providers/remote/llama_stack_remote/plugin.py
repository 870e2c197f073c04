"""Declares the provider ``remote`` of every API that is known, a third party's too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from llama_stack.apis import Api
from llama_stack.plugins import ProviderSpec, hookimpl

from .config import RemoteConfig


class _Start(Protocol):
    def __call__(self, config: RemoteConfig) -> AbstractAsyncContextManager[Api]: ...


@hookimpl
def llama_stack_providers(apis: Sequence[type[Api]]) -> Iterator[ProviderSpec]:
    """One provider an API, all of them the same function."""
    for api in apis:
        yield ProviderSpec(
            api=api,
            name="remote",
            config=RemoteConfig,
            start=_start_of(api),
            description="the same API of another Llama Stack",
        )


def _start_of(api: type[Api]) -> _Start:
    async def start_remote(config: RemoteConfig) -> AsyncIterator[Api]:
        from .provider import connected  # the HTTP client is imported when a distribution names this provider

        async with connected(api, config) as implementation:
            yield implementation

    start_remote.__annotations__["return"] = AsyncIterator[api]  # type: ignore[valid-type]  # known only here
    return asynccontextmanager(start_remote)
