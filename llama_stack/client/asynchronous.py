"""The client for async code: every API that a stack serves, as its contract, over HTTP or in this process."""

from __future__ import annotations

import ssl
from types import TracebackType
from typing import Protocol, Self, TypeVar

from ..apis import (
    AgenticSystem,
    Api,
    Datasets,
    Inference,
    MemoryBanks,
    Models,
    PostTraining,
    RewardScoring,
    Safety,
    SyntheticDataGeneration,
)
from .connection import DEFAULT_TIMEOUTS, MAX_REPLY_BYTES, Connection, Timeouts
from .remote import RemoteApis

A = TypeVar("A", bound=Api)


class Source(Protocol):
    """What has the APIs: a stack, or a server."""

    def api(self, contract: type[A]) -> A: ...


class AsyncClient:
    """A stack as its users see it: each attribute is an implementation of one contract.

    Use it in an ``async with`` block, or close it with ``aclose``.
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
        """Talk to the server at ``base_url``, such as ``http://127.0.0.1:8321``; nothing is sent yet.

        ``trust_env`` takes proxies and certificates from the environment. ``max_reply_bytes`` bounds a whole reply and
        one item of a stream. Raises ``ValueError`` for an address that is none.
        """
        connection = Connection(
            base_url,
            timeouts=timeouts,
            api_key=api_key,
            ssl_context=ssl_context,
            trust_env=trust_env,
            max_reply_bytes=max_reply_bytes,
        )
        self._source: Source = RemoteApis(connection)
        self._close = connection.aclose

    @classmethod
    def over(cls, stack: Source) -> Self:
        """A client of a stack that runs in this process and event loop: no HTTP, the stack's own objects.

        The client neither starts nor stops the stack.
        """
        client = cls.__new__(cls)
        client._source = stack
        client._close = _nothing
        return client

    def api(self, contract: type[A]) -> A:
        """An implementation of any contract, a third party's too."""
        return self._source.api(contract)

    async def aclose(self) -> None:
        """Close the connections; a second call does nothing."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def inference(self) -> Inference:
        return self.api(Inference)

    @property
    def safety(self) -> Safety:
        return self.api(Safety)

    @property
    def memory_banks(self) -> MemoryBanks:
        return self.api(MemoryBanks)

    @property
    def agentic_system(self) -> AgenticSystem:
        return self.api(AgenticSystem)

    @property
    def datasets(self) -> Datasets:
        return self.api(Datasets)

    @property
    def post_training(self) -> PostTraining:
        return self.api(PostTraining)

    @property
    def reward_scoring(self) -> RewardScoring:
        return self.api(RewardScoring)

    @property
    def synthetic_data_generation(self) -> SyntheticDataGeneration:
        return self.api(SyntheticDataGeneration)

    @property
    def models(self) -> Models:
        return self.api(Models)


async def _nothing() -> None:
    pass
