"""What is tested: a server at an address, and what the tester knows of it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx2

from ...apis import APIS, Api, Models
from ...apis.models import ModelKind, ServedModel
from ...client import AsyncClient
from ...client.connection import Timeouts
from ...errors import StackError
from .checks import Skipped

A = TypeVar("A", bound=Api)

_TIMEOUTS = Timeouts(read_seconds=110.0)


class Subject:
    """A server, asked as any client asks it. What is made on it has ids of this run, so that nobody's data suffers.

    ``provider`` narrows what is tested to one provider's models. ``restart`` and ``is_idle`` are there where the server
    runs in this process.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        provider: str | None = None,
        models: dict[ModelKind, str] | None = None,
    ) -> None:
        self.provider = provider
        self.restarter: Callable[[], Awaitable[str]] | None = None
        self.start_and_stop: Callable[[], Awaitable[list[str]]] | None = None
        """Starts another one and stops it; returns what it left behind."""
        self.busy: Callable[[], list[str]] | None = None
        """What the server works at now, besides waiting for requests."""
        self._api_key = api_key
        self._models = dict(models or {})
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._connect(url)

    def _connect(self, url: str) -> None:
        self.url = url
        headers = {"authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        self.client = AsyncClient(url, timeouts=_TIMEOUTS, api_key=self._api_key)
        self.http = httpx2.AsyncClient(base_url=url, headers=headers, timeout=110.0, trust_env=False)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.aclose()
        await self.http.aclose()

    def api(self, contract: type[A]) -> A:
        """The contract, as the server serves it."""
        return self.client.api(contract)

    def new_id(self, word: str) -> str:
        """An id that nothing else has."""
        return f"conformance-{word}-{self._run}-{next(self._numbers)}"

    async def model(self, kind: ModelKind = ModelKind.LLM, *, is_anyones: bool = False) -> str:
        """A model of the kind, of the provider that is tested or of anyone's. Raises ``Skipped`` without one."""
        if kind not in self._models:
            served = [model for model in await self.models(is_anyones=is_anyones) if model.kind is kind]
            if not served:
                raise Skipped(f"no model of kind {kind.value} is served")
            own = [model for model in served if model.alias_of is None]
            self._models[kind] = (own or served)[0].model
        return self._models[kind]

    async def models(self, *, is_anyones: bool = False) -> list[ServedModel]:
        """The models that are served, of the provider that is tested or of anyone's.

        Raises ``Skipped`` where they are not listed.
        """
        try:
            found = [model async for model in await self.client.models.list_models()]
        except StackError as error:
            raise Skipped(f"the models are not listed ({error.detail}); name one") from error
        return [model for model in found if is_anyones or self.provider in (None, model.provider_id)]

    async def restart(self) -> None:
        """Stop the server and start it on what it kept. Raises ``Skipped`` for one that is not ours to stop."""
        if self.restarter is None:
            raise Skipped("the server is not this process's to restart")
        await self.aclose()
        self._connect(await self.restarter())

    async def answers(self) -> bool:
        """Whether anything at the address speaks HTTP."""
        try:
            await self.http.get("/health/live")
        except httpx2.HTTPError:
            return False
        return True

    async def served(self) -> list[type[Api]]:
        """The contracts that the server says it serves; all of the core's where it does not say."""
        try:
            reply = await self.http.get("/providers/list", headers={"accept": "application/json"})
            names = {entry["api"] for entry in reply.json()} if reply.status_code == 200 else None
        except (httpx2.HTTPError, ValueError, TypeError, KeyError):
            names = None
        return [api for api in APIS if names is None or api.name in names or api is Models]
