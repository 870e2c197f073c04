"""A plugin with small real providers, for tests of distributions, plugins and the registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr

from llama_stack.apis import AgenticSystem, Api, Config, Datasets, Inference, MemoryBanks, Safety, get
from llama_stack.apis.safety import RunShieldRequest, RunShieldResponse, Violation
from llama_stack.plugins import (
    ApiSpec,
    CommandSpec,
    FaceSpec,
    MiddlewareSpec,
    ProviderSpec,
    ToolSpec,
    hookimpl,
)
from llama_stack.storage import Blobs, Database


def never() -> Any:
    """Stands where the tests check a declaration and start nothing."""
    raise NotImplementedError


class ByFolder(Config):
    """Weights in a folder."""

    kind: Literal["folder"]
    path: str


class ByUrl(Config):
    """Weights behind a URL."""

    kind: Literal["url"]
    url: str


class EchoConfig(Config):
    """How the echo answers."""

    greeting: str
    """What every answer begins with."""
    times: int = Field(default=1, ge=1, le=9)
    """How often it repeats itself."""
    ratio: float = Field(default=0.5, gt=0, lt=1)
    loud: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    api_key: SecretStr | None = None
    words: tuple[str, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    window: int | Literal["all"] = "all"
    weights: Annotated[ByFolder | ByUrl, Field(discriminator="kind")] | None = None


class WordsConfig(Config):
    """What the shield objects to."""

    words: tuple[str, ...] = ()
    """The words."""


class WordShield(Safety):
    """Objects to messages that hold one of its words."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words

    async def shields(self) -> list[str]:
        return ["words"]

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        text = str(request.messages[-1].content)
        found = [word for word in self._words if word in text]
        if not found:
            return RunShieldResponse()
        return RunShieldResponse(violation=Violation(violation_type="words", details=", ".join(found)))


class Translation(Api, name="translation"):
    """An API that the core does not know."""

    @get("/translation/languages")
    async def languages(self) -> list[str]:
        """The languages that texts can be translated into."""
        raise NotImplementedError


class Dictionary(Translation):
    """Knows the languages of its dictionary."""

    async def languages(self) -> list[str]:
        return ["eo", "la"]


@asynccontextmanager
async def start_words(config: WordsConfig) -> AsyncIterator[Safety]:
    yield WordShield(config.words)


@asynccontextmanager
async def start_echo(config: EchoConfig, safety: Safety | None) -> AsyncIterator[Inference]:
    yield never()


@asynccontextmanager
async def start_careful(inference: Inference) -> AsyncIterator[Safety]:
    yield WordShield(())


@asynccontextmanager
async def start_banks(agents: AgenticSystem, database: Database, blobs: Blobs) -> AsyncIterator[MemoryBanks]:
    yield never()


@asynccontextmanager
async def start_agents(banks: MemoryBanks) -> AsyncIterator[AgenticSystem]:
    yield never()


@asynccontextmanager
async def start_odd(depth: int) -> AsyncIterator[Datasets]:
    yield never()


@asynccontextmanager
async def start_dictionary() -> AsyncIterator[Translation]:
    yield Dictionary()


@asynccontextmanager
async def start_dice() -> AsyncIterator[object]:
    yield object()


@asynccontextmanager
async def start_plain(config: WordsConfig) -> AsyncIterator[object]:
    yield object()


@asynccontextmanager
async def start_talk(inference: Inference) -> AsyncIterator[object]:
    yield object()


@hookimpl
def llama_stack_apis() -> list[ApiSpec]:
    return [ApiSpec(api=Translation)]


@hookimpl
def llama_stack_providers() -> list[ProviderSpec]:
    return [
        ProviderSpec(api=Inference, name="echo", config=EchoConfig, start=start_echo, description="Says it again"),
        ProviderSpec(api=Safety, name="words", config=WordsConfig, start=start_words),
        ProviderSpec(api=Safety, name="careful", start=start_careful),
        ProviderSpec(api=MemoryBanks, name="banks", start=start_banks),
        ProviderSpec(api=AgenticSystem, name="agents", start=start_agents),
        ProviderSpec(api=Datasets, name="odd", start=start_odd),
        ProviderSpec(api=Translation, name="dictionary", start=start_dictionary),
    ]


@hookimpl
def llama_stack_tools() -> list[ToolSpec]:
    return [ToolSpec(name="dice", start=start_dice)]


@hookimpl
def llama_stack_faces() -> list[FaceSpec]:
    return [
        FaceSpec(name="plain", start=start_plain, config=WordsConfig),
        FaceSpec(name="talk", start=start_talk),
        FaceSpec(name="odd-face", start=start_odd),
    ]


@hookimpl
def llama_stack_commands() -> list[CommandSpec]:
    return [CommandSpec(name="echo", help="Say it again.", target="tests.sample_plugin:start_echo")]


@hookimpl
def llama_stack_middleware() -> list[MiddlewareSpec]:
    return [MiddlewareSpec(name="audit", wrap=lambda app, config: app, config=WordsConfig)]
