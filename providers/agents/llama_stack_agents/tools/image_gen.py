"""The tool ``image_gen``: a picture for a prompt, from a service with OpenAI's images API, or a pattern made here.

What comes back is attached as a ``data:`` URL, after a look at its first bytes: nobody follows a link to it later.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, Field

from llama_stack.apis import Config
from llama_stack.apis.common import Attachment, Content, ToolDefinition
from llama_stack.errors import StackError, UpstreamError
from llama_stack.fetch import FetchConfig, Fetcher, Host, Network
from llama_stack.tools import Tool

from .pattern import COMMENT, pattern
from .services import Address, Key, ServiceConfig, parsed

NAME = "image_gen"
MAX_PROMPT_CHARACTERS = 4000
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


class PatternConfig(Config):
    """A pattern made from the prompt's words, without any model."""

    kind: Literal["pattern"] = "pattern"
    pixels: int = Field(default=256, ge=16, le=1024, multiple_of=2)
    """The length of a side."""


class OpenAiConfig(ServiceConfig):
    """A service that has OpenAI's ``POST /v1/images/generations``."""

    kind: Literal["openai"]
    url: Address = "https://api.openai.com"
    key: Key | None = None
    """The key that it asks for."""
    model: str = Field(min_length=1, max_length=255)
    """The model by the service's name."""
    size: str | None = Field(default=None, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    """What is asked for as ``size``, such as ``1024x1024``; the service's own choice when left out."""
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    """What is asked for as ``response_format``; ``null`` for models that refuse the word, as ``gpt-image-1`` does."""
    image_hosts: tuple[Host, ...] = ()
    """Public hosts that an image may be fetched from where the service answers with a URL."""
    timeout_seconds: float = Field(default=60.0, gt=0, le=600)
    """How long the service may take over a picture."""


EngineConfig = Annotated[PatternConfig | OpenAiConfig, Field(discriminator="kind")]


class ImageGenConfig(Config):
    """What draws, and how large its pictures may be."""

    engine: EngineConfig = PatternConfig()
    """``openai`` for a service, or ``pattern``, which is no model."""
    max_bytes: int = Field(default=4 * 1024**2, ge=1024, le=64 * 1024**2)
    """The largest picture."""


class Painter(Protocol):
    """What draws."""

    @property
    def words(self) -> str:
        """What a picture is, in words for the model and the user."""
        ...

    async def paint(self, prompt: str, seed: int) -> bytes:
        """A picture as a file. Raises ``StackError``."""
        ...


class PatternPainter:
    """Draws patterns."""

    words = COMMENT

    def __init__(self, config: PatternConfig) -> None:
        self._config = config

    async def paint(self, prompt: str, seed: int) -> bytes:
        return await asyncio.to_thread(pattern, prompt, seed, self._config.pixels)


class _Image(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class _Images(BaseModel):
    data: list[_Image] = Field(min_length=1)


class ServicePainter:
    """Asks a service. What it links to is fetched as any stranger's URL is."""

    def __init__(self, config: OpenAiConfig, *, max_bytes: int, network: Network | None = None) -> None:
        self._config = config
        self._service = Fetcher.of_service(
            config.url,
            is_private=config.private,
            max_bytes=2 * max_bytes + 65_536,  # as base64, with words around it
            timeout_seconds=config.timeout_seconds,
            network=network,
        )
        linked = FetchConfig(hosts=config.image_hosts, max_bytes=max_bytes, timeout_seconds=config.timeout_seconds)
        self._links = Fetcher(linked, network=network)

    @property
    def words(self) -> str:
        return f"A picture by {self._config.model}."

    async def paint(self, prompt: str, seed: int) -> bytes:
        """The seed is not told: the API has no word for it."""
        wanted = {"size": self._config.size, "response_format": self._config.response_format}
        asked = {"model": self._config.model, "prompt": prompt, "n": 1} | {k: v for k, v in wanted.items() if v}
        key = self._config.key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        url = self._config.at("/v1/images/generations")
        try:
            answer = await self._service.ask(url, headers=headers, body=json.dumps(asked).encode())
        except StackError as error:
            raise UpstreamError(f"the image service cannot be asked: {error.detail}") from error
        # megabytes of it, which the event loop does not wait for
        images = await asyncio.to_thread(parsed, "the image service", answer, _Images)
        return await self._picture(images.data[0])

    async def _picture(self, image: _Image) -> bytes:
        if image.b64_json is not None:
            try:
                return await asyncio.to_thread(base64.b64decode, image.b64_json, validate=True)
            except (binascii.Error, ValueError) as error:
                raise UpstreamError("the image service answered with base64 that is none") from error
        if image.url is None:
            raise UpstreamError("the image service answered without an image")
        try:
            return (await self._links.fetch(image.url)).body
        except StackError as error:
            raise UpstreamError(f"the image cannot be fetched from where the service put it: {error.detail}") from error


class ImageGen(Tool):
    """Attaches a picture to its answer."""

    def __init__(self, painter: Painter, *, max_bytes: int) -> None:
        self._painter = painter
        self._max_bytes = max_bytes
        self._function = Tool.from_function(self._draw, name=NAME)

    @property
    def definition(self) -> ToolDefinition:
        is_pattern = isinstance(self._painter, PatternPainter)
        what = "Makes a pattern from a prompt's words; it cannot draw things." if is_pattern else "Draws a picture."
        return self._function.definition.model_copy(update={"description": what})

    async def run(self, arguments: Mapping[str, Any]) -> Content:
        return await self._function.run(arguments)

    def readiness_details(self) -> Mapping[str, str]:
        if isinstance(self._painter, PatternPainter):
            return {"engine": "pattern", "notice": "image_gen makes patterns from words; no image model is configured"}
        return {"engine": "openai"}

    async def _draw(
        self,
        prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS, description="what is to be seen")],
        seed: Annotated[int, Field(ge=0, lt=2**63, description="another number, another pattern")] = 0,
    ) -> list[str | Attachment]:
        picture = await self._painter.paint(prompt, seed)
        if len(picture) > self._max_bytes:
            raise UpstreamError(f"the picture has {len(picture)} bytes, and at most {self._max_bytes} are taken")
        kind = _kind_of(picture)
        if kind is None:
            raise UpstreamError("what was drawn is neither PNG, JPEG, GIF nor WebP")
        encoded = await asyncio.to_thread(base64.b64encode, picture)
        url = f"data:{kind};base64,{encoded.decode()}"
        return [self._painter.words, Attachment(url=url, mime_type=kind)]


def image_gen(config: ImageGenConfig, *, network: Network | None = None) -> ImageGen:
    """The tool as it is configured."""
    engine = config.engine
    painter: Painter = (
        PatternPainter(engine)
        if isinstance(engine, PatternConfig)
        else ServicePainter(engine, max_bytes=config.max_bytes, network=network)
    )
    return ImageGen(painter, max_bytes=config.max_bytes)


def _kind_of(picture: bytes) -> str | None:
    """By its first bytes; what a server calls it is not asked."""
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _KINDS.items() if picture.startswith(start)), None)
