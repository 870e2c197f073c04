"""Search engines of the web: what each is asked, and how it answers, as its own documentation has it.

- Brave Search: ``GET /res/v1/web/search`` (api-dashboard.search.brave.com)
- Tavily: ``POST /search`` (docs.tavily.com)
- SearXNG, of one's own: ``GET /search?format=json`` (docs.searxng.org, "Search API")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from typing import Literal, Protocol
from urllib.parse import urlencode

from pydantic import BaseModel

from llama_stack.errors import StackError, UpstreamError
from llama_stack.fetch import Fetched, Fetcher, Network

from .services import Address, Key, ServiceConfig, parsed

MAX_REPLY_BYTES = 1024 * 1024
_MARKUP = re.compile(r"</?[A-Za-z][^<>]{0,100}>")


@dataclass(frozen=True)
class Hit:
    """Something that was found, in the words of whoever wrote it."""

    title: str
    place: str
    """A URL, or a file's path in its folder."""
    text: str


class SearchEngine(Protocol):
    """Whom ``web_search`` asks."""

    @property
    def name(self) -> str:
        """What it is called, to the model and to the operator."""
        ...

    async def search(self, query: str, count: int) -> Sequence[Hit]:
        """What there is, the best first, at least up to ``count``. Raises ``StackError``."""
        ...


class BraveConfig(ServiceConfig):
    """Brave Search."""

    kind: Literal["brave"]
    key: Key
    """The subscription's token."""
    url: Address = "https://api.search.brave.com"


class TavilyConfig(ServiceConfig):
    """Tavily."""

    kind: Literal["tavily"]
    key: Key
    """The account's key."""
    url: Address = "https://api.tavily.com"


class SearxngConfig(ServiceConfig):
    """A SearXNG of one's own, whose ``search.formats`` have ``json``."""

    kind: Literal["searxng"]


class _Service:
    """A search engine behind an address."""

    name: str

    def __init__(self, config: ServiceConfig, *, timeout_seconds: float, network: Network | None) -> None:
        self._config = config
        self._fetcher = Fetcher.of_service(
            config.url,
            is_private=config.private,
            max_bytes=MAX_REPLY_BYTES,
            timeout_seconds=timeout_seconds,
            network=network,
        )

    async def _ask(self, path: str, headers: Mapping[str, str], body: bytes | None = None) -> Fetched:
        accepted = {"Accept": "application/json", **headers}
        try:
            return await self._fetcher.ask(self._config.at(path), headers=accepted, body=body)
        except StackError as error:
            raise UpstreamError(f"{self.name} cannot be asked: {error.detail}") from error


class _BraveHit(BaseModel):
    title: str = ""
    url: str
    description: str | None = None


class _BraveWeb(BaseModel):
    results: list[_BraveHit] = []


class _BraveReply(BaseModel):
    type: Literal["search"]
    web: _BraveWeb | None = None
    """Left out where nothing was found."""


class Brave(_Service):
    """Brave Search; its texts carry HTML."""

    name = "Brave Search"

    def __init__(self, config: BraveConfig, *, timeout_seconds: float, network: Network | None = None) -> None:
        super().__init__(config, timeout_seconds=timeout_seconds, network=network)
        self._key = config.key

    async def search(self, query: str, count: int) -> Sequence[Hit]:
        asked = urlencode({"q": query, "count": count, "result_filter": "web"})
        headers = {"X-Subscription-Token": self._key.get_secret_value()}
        reply = parsed(self.name, await self._ask(f"/res/v1/web/search?{asked}", headers), _BraveReply)
        found = reply.web.results[:count] if reply.web else []
        return [Hit(_unmarked(hit.title), hit.url, _unmarked(hit.description or "")) for hit in found]


class _Found(BaseModel):
    """As Tavily and SearXNG both have it."""

    title: str | None = None
    url: str
    content: str | None = None

    @property
    def hit(self) -> Hit:
        return Hit(self.title or "", self.url, self.content or "")


class _Results(BaseModel):
    results: list[_Found]


class Tavily(_Service):
    """Tavily."""

    name = "Tavily"

    def __init__(self, config: TavilyConfig, *, timeout_seconds: float, network: Network | None = None) -> None:
        super().__init__(config, timeout_seconds=timeout_seconds, network=network)
        self._key = config.key

    async def search(self, query: str, count: int) -> Sequence[Hit]:
        asked = json.dumps({"query": query, "max_results": count, "search_depth": "basic"}).encode()
        headers = {"Authorization": f"Bearer {self._key.get_secret_value()}"}
        reply = parsed(self.name, await self._ask("/search", headers, asked), _Results)
        return [found.hit for found in reply.results[:count]]


class Searxng(_Service):
    """A SearXNG of the operator's; how many results a page has is set there."""

    name = "SearXNG"

    def __init__(self, config: SearxngConfig, *, timeout_seconds: float, network: Network | None = None) -> None:
        super().__init__(config, timeout_seconds=timeout_seconds, network=network)

    async def search(self, query: str, count: int) -> Sequence[Hit]:
        answer = await self._ask(f"/search?{urlencode({'q': query, 'format': 'json'})}", {})
        if answer.status == 403:
            raise UpstreamError("SearXNG does not answer in JSON: its search.formats lack 'json'")
        return [found.hit for found in parsed(self.name, answer, _Results).results[:count]]


def _unmarked(text: str) -> str:
    return unescape(_MARKUP.sub("", text))
