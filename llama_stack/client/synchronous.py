"""The client for code that is not async: the same APIs, with methods that wait and plain iterators."""

from __future__ import annotations

import ssl
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from .asynchronous import AsyncClient
from .connection import DEFAULT_TIMEOUTS, MAX_REPLY_BYTES, Timeouts
from .event_loop import EventLoopThread
from .forms import (
    BlockingAgenticSystem,
    BlockingApi,
    BlockingDatasets,
    BlockingInference,
    BlockingMemoryBanks,
    BlockingModels,
    BlockingPostTraining,
    BlockingRewardScoring,
    BlockingSafety,
    BlockingSyntheticDataGeneration,
)

if TYPE_CHECKING:
    from ..stack import Stack

B = TypeVar("B", bound=BlockingApi)


class Client:
    """A stack as its users see it, for code that is not async; any number of threads may share it.

    Use it in a ``with`` block, or close it with ``close``: it owns a thread.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        api_key: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        trust_env: bool = False,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        """Talk to the server at ``base_url``; the arguments are those of ``AsyncClient``."""
        client = AsyncClient(
            base_url,
            timeouts=timeouts,
            api_key=api_key,
            ssl_context=ssl_context,
            trust_env=trust_env,
            max_reply_bytes=max_reply_bytes,
        )
        self._resources = AsyncExitStack()
        self._resources.push_async_callback(client.aclose)
        self._client = client
        self._thread = EventLoopThread()

    @classmethod
    def over(cls, stack: Stack) -> Self:
        """Start a stack in this process, in the client's own thread, and be its client; closing the client stops it.

        Raises ``ProviderStartError`` when a required provider does not start.
        """
        from ..stack import running  # a client over HTTP needs none of what a stack is made of

        client = cls.__new__(cls)
        client._resources = AsyncExitStack()
        client._client = AsyncClient.over(stack)
        client._thread = EventLoopThread()
        try:
            client._thread.run(client._resources.enter_async_context(running(stack)))
        except BaseException:
            client._thread.close()
            raise
        return client

    def api(self, form: type[B]) -> B:
        """The blocking form of any contract, a third party's too."""
        return form(self._client.api(form.contract), self._thread)

    def close(self) -> None:
        """Close the connections, or stop the stack, and end the thread; a second call does nothing."""
        if not self._thread.is_closed:
            try:
                self._thread.run(self._resources.aclose())
            finally:
                self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def inference(self) -> BlockingInference:
        return self.api(BlockingInference)

    @property
    def safety(self) -> BlockingSafety:
        return self.api(BlockingSafety)

    @property
    def memory_banks(self) -> BlockingMemoryBanks:
        return self.api(BlockingMemoryBanks)

    @property
    def agentic_system(self) -> BlockingAgenticSystem:
        return self.api(BlockingAgenticSystem)

    @property
    def datasets(self) -> BlockingDatasets:
        return self.api(BlockingDatasets)

    @property
    def post_training(self) -> BlockingPostTraining:
        return self.api(BlockingPostTraining)

    @property
    def reward_scoring(self) -> BlockingRewardScoring:
        return self.api(BlockingRewardScoring)

    @property
    def synthetic_data_generation(self) -> BlockingSyntheticDataGeneration:
        return self.api(BlockingSyntheticDataGeneration)

    @property
    def models(self) -> BlockingModels:
        return self.api(BlockingModels)
