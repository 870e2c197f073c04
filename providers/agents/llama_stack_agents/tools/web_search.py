"""The tool ``web_search``: one question, a few results, from whichever engine the operator names.

What comes back is other people's words. They are cut to a size, freed of what does not print, and told as what they
are; nothing that they point to is opened.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from pydantic import Field

from llama_stack.apis import Config
from llama_stack.apis.common import Content, ToolDefinition
from llama_stack.fetch import Network
from llama_stack.tools import Tool

from .local_index import LocalConfig, LocalIndex, indexed
from .search_engines import Brave, BraveConfig, Hit, SearchEngine, Searxng, SearxngConfig, Tavily, TavilyConfig

NAME = "web_search"
MAX_QUERY_CHARACTERS = 400
"""As many as Brave Search takes."""
MAX_TITLE_CHARACTERS = 200
_PLACE = re.compile(r"https?://[!-~]{1,1000}")
_UNPRINTED = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]+")
"""White space of every kind, and marks that turn the direction of text or do not show."""

EngineConfig = BraveConfig | TavilyConfig | SearxngConfig | LocalConfig


class WebSearchConfig(Config):
    """Which engine is asked, and how much of its answer a model reads."""

    engine: EngineConfig = Field(discriminator="kind")
    """``brave``, ``tavily``, ``searxng``, or ``local``: the documents of a folder of this machine, without any web."""
    results: int = Field(default=5, ge=1, le=20)
    """The most results of a search."""
    max_characters: int = Field(default=600, ge=50, le=4000)
    """The most characters of a result's text."""
    timeout_seconds: float = Field(default=20.0, gt=0, le=600)
    """How long an engine may take."""


class WebSearch(Tool):
    """Asks an engine for a model. ``started`` makes it."""

    def __init__(self, engine: SearchEngine, config: WebSearchConfig) -> None:
        self._engine = engine
        self._config = config
        self._function = Tool.from_function(self._search, name=NAME)

    @property
    def definition(self) -> ToolDefinition:
        """It says of a local index that it is one: the model must not take it for the web."""
        where = f"Searches {self._engine.name}; it does not reach the web." if self._is_local else "Searches the web."
        return self._function.definition.model_copy(update={"description": where})

    async def run(self, arguments: Mapping[str, Any]) -> Content:
        return await self._function.run(arguments)

    def readiness_details(self) -> Mapping[str, str]:
        if isinstance(self._engine, LocalIndex):
            left_out = f", {self._engine.left_out} files of other kinds left out" if self._engine.left_out else ""
            return {"engine": "local", "notice": f"web_search reads {self._engine.name}, not the web{left_out}"}
        return {"engine": self._engine.name}

    @property
    def _is_local(self) -> bool:
        return isinstance(self._engine, LocalIndex)

    async def _search(
        self,
        query: Annotated[
            str, Field(min_length=1, max_length=MAX_QUERY_CHARACTERS, description="what to look for, in a few words")
        ],
    ) -> str:
        found = await self._engine.search(query, self._config.results)
        told = [text for hit in found[: self._config.results] if (text := self._told(hit))]
        where = f"{self._engine.name} (not the web)" if self._is_local else self._engine.name
        if not told:
            return f"Nothing was found in {where}."
        return "\n\n".join([f"Found in {where}:", *(f"{number}. {text}" for number, text in enumerate(told, 1))])

    def _told(self, hit: Hit) -> str:
        """A result as the model reads it; nothing of one whose place is no address."""
        if not self._is_local and not _PLACE.fullmatch(hit.place):
            return ""
        title = _cut(hit.title, MAX_TITLE_CHARACTERS) or "(without a title)"
        lines = [title, _cut(hit.place, len(hit.place)), _cut(hit.text, self._config.max_characters)]
        return "\n".join(filter(None, lines))


@asynccontextmanager
async def started(config: WebSearchConfig, *, network: Network | None = None) -> AsyncIterator[WebSearch]:
    """The tool over its engine. Raises ``ProviderStartError`` for a folder that cannot be searched."""
    engine, seconds = config.engine, config.timeout_seconds
    if isinstance(engine, LocalConfig):
        index = await indexed(engine)
        try:
            yield WebSearch(index, config)
        finally:
            index.close()
    elif isinstance(engine, BraveConfig):
        yield WebSearch(Brave(engine, timeout_seconds=seconds, network=network), config)
    elif isinstance(engine, TavilyConfig):
        yield WebSearch(Tavily(engine, timeout_seconds=seconds, network=network), config)
    else:
        yield WebSearch(Searxng(engine, timeout_seconds=seconds, network=network), config)


def _cut(text: str, most: int) -> str:
    """On one line, and not longer than that; where something was cut, that shows."""
    plain = _UNPRINTED.sub(" ", text[: 4 * most]).strip()
    return plain if len(plain) <= most and len(text) <= 4 * most else plain[: most - 1].rstrip() + "…"
