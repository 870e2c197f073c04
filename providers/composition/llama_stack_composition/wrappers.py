"""The wrappers: each starts the providers that its config names and yields one that stands before them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, Metric

from llama_stack.apis import Api, Shape, operations
from llama_stack.errors import (
    DeadlineExceededError,
    ServiceError,
    SetupError,
    UnavailableError,
    listed,
    nearest,
)
from llama_stack.inner import Inner

from .config import CacheConfig, CanaryConfig, FallbackConfig, RecordConfig, ReplayConfig, ShadowConfig
from .forwarding import Call, begun, call, forwarding, watched
from .recording import Recording, recorded, replayed

A = TypeVar("A", bound=Api)

logger = logging.getLogger("llama_stack.composition")


@asynccontextmanager
async def fallback(api: type[A], config: FallbackConfig, inner: Inner) -> AsyncIterator[A]:
    """Ask the providers one after another until one serves. Of a stream, until one's first item is there.

    A refusal of the request itself (4xx) is an answer. One that does not start is left out, as long as another does.
    """
    async with AsyncExitStack() as stack:
        started: list[Api] = []
        failed: list[str] = []
        for entry in config.providers:
            try:
                started.append(await stack.enter_async_context(inner.start(entry)))
            except Exception as error:
                failed.append(f"{entry.name}: {error}")
                logger.warning("fallback goes on without provider %r: %s", entry.name, error)
        if not started:
            raise SetupError(f"none of the providers behind fallback starts: {'; '.join(failed)}")

        async def handle(asked: Call) -> Any:
            last: Exception | None = None
            for number, provider in enumerate(started):
                try:
                    async with asyncio.timeout(config.answer_seconds):
                        answer = await call(provider, asked)
                        return await begun(answer) if asked.is_stream else answer
                except TimeoutError:
                    last = DeadlineExceededError("no answer began in time")
                except Exception as error:
                    if not _is_outage(error):
                        raise
                    last = error
                logger.warning(
                    "%s: provider %d of %d cannot serve: %s", asked.operation.key, number + 1, len(started), last
                )
            assert last is not None, "at least one is asked"
            raise last

        yield forwarding(api, handle, started)


@asynccontextmanager
async def canary(api: type[A], config: CanaryConfig, inner: Inner) -> AsyncIterator[A]:
    """Send a share of the requests to the canary."""
    chance = random.Random(config.seed)
    counts: Counter[str] = Counter()
    async with inner.start(config.stable) as stable, inner.start(config.canary) as tried:

        async def handle(asked: Call) -> Any:
            if chance.random() >= config.share:
                counts["stable"] += 1
                return await call(stable, asked)
            counts["canary"] += 1
            try:
                answer = await call(tried, asked)
                return await begun(answer) if asked.is_stream else answer
            except Exception as error:
                if not (config.falls_back and _is_outage(error)):
                    raise
                counts["canary_failed"] += 1
                logger.warning("%s: the canary cannot serve: %s", asked.operation.key, error)
                return await call(stable, asked)

        yield _counted(forwarding(api, handle, [stable, tried]), "canary_requests", counts)


@asynccontextmanager
async def shadow(api: type[A], config: ShadowConfig, inner: Inner) -> AsyncIterator[A]:
    """Send the requests to the shadow too, after the primary's answer has begun, and count where they differ."""
    counts: Counter[str] = Counter()
    pending: set[asyncio.Task[None]] = set()
    chance = random.Random()
    async with inner.start(config.primary) as primary, inner.start(config.shadow) as tried:

        async def compare(asked: Call, answer: Any) -> None:
            try:
                other = await call(tried, asked)
                other = [item async for item in other] if asked.is_stream else other
            except Exception as error:
                counts["failed"] += 1
                logger.warning("%s: the shadow failed: %s", asked.operation.key, error)
                return
            counts["same" if other == answer else "different"] += 1

        def follow(asked: Call, answer: Any) -> None:
            if len(pending) >= config.max_pending:
                counts["left_out"] += 1
                return
            task = asyncio.create_task(compare(asked, answer), name=f"shadow of {asked.operation.key}")
            pending.add(task)
            task.add_done_callback(pending.discard)

        async def handle(asked: Call) -> Any:
            answer = await call(primary, asked)
            if chance.random() >= config.share:
                return answer
            if not asked.is_stream:
                follow(asked, answer)
                return answer
            items: list[Any] = []
            return watched(answer, items.append, lambda error: None if error else follow(asked, items))

        try:
            yield _counted(forwarding(api, handle, [primary]), "shadow_requests", counts)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)


@asynccontextmanager
async def cache(api: type[A], config: CacheConfig, inner: Inner) -> AsyncIterator[A]:
    """Keep the answers of some operations, whole ones only, and give them again to the same call.

    An answer that was drawn at random is not kept: one to a request with a temperature above 0.
    """
    kept_operations = _checked(api, config.operations)
    kept: OrderedDict[str, tuple[float, int, Any]] = OrderedDict()
    counts: Counter[str] = Counter()
    size = 0
    async with inner.start(config.provider) as provider:

        def keep(asked: Call, key: str, answer: Any) -> None:
            nonlocal size
            bytes_ = len(key) + _size(asked, answer)
            if bytes_ > config.max_bytes:
                return
            size -= kept.pop(key, (0.0, 0, None))[1]
            kept[key] = (monotonic(), bytes_, answer)
            size += bytes_
            while size > config.max_bytes or len(kept) > config.max_entries:
                size -= kept.popitem(last=False)[1][1]

        async def handle(asked: Call) -> Any:
            nonlocal size
            if asked.operation.key not in kept_operations or _is_drawn(asked):
                return await call(provider, asked)
            key = asked.key()
            at, bytes_, answer = kept.get(key, (0.0, 0, None))
            if key in kept and (config.ttl_seconds is None or monotonic() - at < config.ttl_seconds):
                kept.move_to_end(key)
                counts["hit"] += 1
                return _each(answer) if asked.is_stream else answer
            if key in kept:
                del kept[key]
                size -= bytes_
            counts["miss"] += 1
            answer = await call(provider, asked)
            if not asked.is_stream:
                keep(asked, key, answer)
                return answer
            items: list[Any] = []
            return watched(answer, items.append, lambda error: None if error else keep(asked, key, items))

        yield _counted(forwarding(api, handle, [provider]), "cache_requests", counts)


@asynccontextmanager
async def record(api: type[A], config: RecordConfig, inner: Inner) -> AsyncIterator[A]:
    """Write every call and its answer to a file, errors too; what a client left in the middle is not written."""
    async with inner.start(config.provider) as provider:
        with Recording(config.file) as recording:

            async def handle(asked: Call) -> Any:
                try:
                    answer = await call(provider, asked)
                except Exception as error:
                    recording.add(asked, error=error)
                    raise
                if not asked.is_stream:
                    recording.add(asked, value=answer)
                    return answer
                items: list[Any] = []
                return watched(answer, items.append, lambda error: recording.add(asked, value=items, error=error))

            yield recorded(forwarding(api, handle, [provider]), provider, recording)


@asynccontextmanager
async def replay(api: type[A], config: ReplayConfig, inner: Inner) -> AsyncIterator[A]:
    """Answer from a file, call by call in the order of the recording; a call that is not in it is a 404."""
    yield replayed(api, config.file, repeats=config.repeats)


def _is_outage(error: Exception) -> bool:
    """Whether another provider may serve what this one could not."""
    return isinstance(error, ServiceError | UnavailableError) or not hasattr(error, "status")


def _is_drawn(asked: Call) -> bool:
    body = asked.arguments.get(asked.operation.body.name) if asked.operation.body else None
    sampling = getattr(body, "sampling_params", None)
    return sampling is not None and sampling.temperature > 0 and sampling.seed is None


def _checked(api: type[Api], keys: Collection[str]) -> set[str]:
    by_key = {operation.key: operation for operation in operations(api)}
    for key in keys:
        if key not in by_key:
            close = nearest(key, by_key) or f"; there are {listed(by_key)}"
            raise SetupError(f"cache: {api.name!r} has no operation {key!r}{close}")
    return set(keys)


def _size(asked: Call, answer: Any) -> int:
    operation = asked.operation
    if operation.shape is Shape.VOID:
        return 0
    if not asked.is_stream:
        return len(operation.result_adapter.dump_json(answer))
    adapter = operation.result_adapter if operation.shape is Shape.LINES else operation.chunk_adapter
    return sum(len(adapter.dump_json(item)) for item in answer)


async def _each(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


def _counted(provider: A, name: str, counts: Counter[str]) -> A:
    def metrics() -> Iterable[Metric]:
        family = CounterMetricFamily(f"llama_stack_{name}", "Requests by what became of them.", labels=["outcome"])
        for outcome, count in counts.items():
            family.add_metric([outcome], count)
        yield family

    provider.prometheus_metrics = metrics  # type: ignore[method-assign]
    return provider
