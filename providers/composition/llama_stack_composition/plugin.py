"""Declares the six providers of every API that is known, a third party's too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from llama_stack.apis import Api, Config
from llama_stack.inner import Inner
from llama_stack.plugins import ProviderSpec, Start, hookimpl

from .config import CacheConfig, CanaryConfig, FallbackConfig, RecordConfig, ReplayConfig, ShadowConfig

_DECLARED: tuple[tuple[str, type[Config], str], ...] = (
    ("fallback", FallbackConfig, "The first of several providers that can serve"),
    ("canary", CanaryConfig, "A provider, and a share of its requests to another"),
    ("shadow", ShadowConfig, "A provider, and the same requests to another that nobody hears"),
    ("cache", CacheConfig, "A provider, and its answers again without it"),
    ("record", RecordConfig, "A provider, and a file of its answers"),
    ("replay", ReplayConfig, "The answers in a file"),
)


@hookimpl
def llama_stack_providers(apis: Sequence[type[Api]]) -> Iterator[ProviderSpec]:
    """Six providers an API."""
    for api in apis:
        for name, config, description in _DECLARED:
            start = _start_of(api, name, config)
            yield ProviderSpec(api=api, name=name, config=config, start=start, description=description)


def _start_of(api: type[Api], name: str, config_type: type[Config]) -> Start:
    @asynccontextmanager
    async def start(config: Any, inner: Inner) -> AsyncIterator[Api]:
        from . import wrappers  # imported when a distribution names one of them

        opened: AbstractAsyncContextManager[Api] = getattr(wrappers, name)(api, config, inner)
        async with opened as provider:
            yield provider

    start.__wrapped__.__annotations__ |= {"config": config_type, "return": AsyncIterator[api]}  # type: ignore[attr-defined, valid-type]
    return start
