"""``image_gen``: patterns that say what they are, and a service with OpenAI's images API that is not trusted."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from llama_stack_agents.tools.image_gen import ImageGen, ImageGenConfig, image_gen
from llama_stack_agents.tools.pattern import COMMENT, pattern
from pydantic import ValidationError

from llama_stack.apis.common import Attachment, Content
from llama_stack.errors import InvalidRequestError, UpstreamError
from llama_stack.registry import Registry, declaration_problems
from llama_stack.testing.network import INTERNAL, OTHER, Handler, StagedNetwork, answering, ok, redirect, serving
from llama_stack.testing.web_services import image_model
from tests.providers.agents.stage import call, stage

pytestmark = pytest.mark.anyio

PNG = pattern("a", 0, 16)


def held(content: Content) -> bytes:
    """The picture that an answer attaches."""
    assert isinstance(content, list)
    assert isinstance(content[1], Attachment)
    return base64.b64decode(content[1].url.partition(",")[2], validate=True)


@asynccontextmanager
async def painting(handler: Handler, **settings: Any) -> AsyncIterator[tuple[ImageGen, StagedNetwork, list[bytes]]]:
    """The tool over a service at public.example."""
    network = StagedNetwork()
    engine = {"kind": "openai", "url": "http://public.example", "model": "m"} | settings.pop("engine", {})
    config = ImageGenConfig.model_validate({"engine": engine} | settings)
    async with serving(network, handler) as requests:
        yield image_gen(config, network=network), network, requests


def chunks(png: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG, each with its checksum looked at (W3C PNG, section 5.3)."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    found, place = {}, 8
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, body = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", png, place + 8 + length) == (zlib.crc32(kind + body),)
        found[kind] = body
        place += 12 + length
    return found


@pytest.mark.parametrize("pixels", [16, 256, 1024])
def test_a_pattern_is_a_whole_png(pixels: int) -> None:
    """Any viewer opens it: the header, the palette, as many rows as it says, and its own words on what it is."""
    found = chunks(pattern("otters", 1, pixels))
    assert list(found) == [b"IHDR", b"PLTE", b"tEXt", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", found[b"IHDR"]) == (pixels, pixels, 8, 3, 0, 0, 0)
    assert len(found[b"PLTE"]) == 768
    assert found[b"tEXt"] == b"Comment\0" + COMMENT.encode()
    rows = zlib.decompress(found[b"IDAT"])
    assert len(rows) == pixels * (pixels + 1)
    assert set(rows[:: pixels + 1]) == {0}
    assert len(set(rows)) > 50  # it is a picture and no surface


def test_a_pattern_is_the_same_for_the_same_words_and_seed() -> None:
    """Whoever runs it: the pixels are pinned here."""
    assert pattern("otters", 1, 64) == pattern("otters", 1, 64)
    assert len({pattern(text, seed, 64) for text in ("otters", "herons", "") for seed in (0, 1)}) == 6
    found = chunks(pattern("otters", 1, 64))
    assert zlib.crc32(found[b"PLTE"] + zlib.decompress(found[b"IDAT"])) == PINNED


PINNED = 1356350259


async def test_patterns_are_what_there_is_without_a_service_and_say_so() -> None:
    """To the model before, to both with the picture, and to the operator."""
    tool = image_gen(ImageGenConfig())
    assert tool.definition.description == "Makes a pattern from a prompt's words; it cannot draw things."
    assert tool.readiness_details()["notice"] == "image_gen makes patterns from words; no image model is configured"
    content = await tool.run({"prompt": "an otter", "seed": 3})
    assert isinstance(content, list)
    assert content[0] == COMMENT
    assert held(content) == pattern("an otter", 3, 256)


async def test_an_agent_s_picture_reaches_the_client_and_its_words_the_model() -> None:
    """A text model is not sent the bytes."""
    async with stage([call("image_gen", prompt="an otter")], ["There."], served=[image_gen(ImageGenConfig())]) as on:
        turn = await on.turn("Draw an otter")
        told = on.prompt()[-1].tool_responses[0].content
    assert told == f"{COMMENT}\n[attached: image/png]"
    assert held(turn.steps[1].tool_responses[0].content) == pattern("an otter", 0, 256)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "arguments", [{}, {"prompt": ""}, {"prompt": "x" * 4001}, {"prompt": 3}, {"prompt": "x", "seed": -1}, {"text": "x"}]
)
async def test_arguments_that_are_none_draw_nothing(arguments: dict[str, Any]) -> None:
    """Models write anything."""
    with pytest.raises(InvalidRequestError, match="arguments are not valid"):
        await image_gen(ImageGenConfig()).run(arguments)


async def test_a_service_draws_and_its_picture_is_attached() -> None:
    """As base64, in one request that holds what the API names."""
    settings = {"key": "k-canary", "size": "256x256"}
    async with painting(image_model(PNG, key="k-canary"), engine=settings) as (tool, _, requests):
        assert tool.definition.description == "Draws a picture."
        content = await tool.run({"prompt": "an otter"})
    assert isinstance(content, list)
    assert content[0] == "A picture by m."
    assert held(content) == PNG
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/images/generations HTTP/1.1")
    assert body == b'{"model": "m", "prompt": "an otter", "n": 1, "size": "256x256", "response_format": "b64_json"}'


@pytest.mark.parametrize(("form", "sent"), [("url", b'"response_format": "url"'), (None, None)])
async def test_a_service_may_answer_with_a_url_of_a_host_that_is_allowed(form: str | None, sent: bytes | None) -> None:
    """And no other: what it links to is a stranger's word."""
    linked = "http://pictures.example/1.png"
    for hosts, told in ((["pictures.example"], None), ([], "host 'pictures.example' is not among")):
        engine = {"response_format": form, "image_hosts": hosts}
        async with painting(image_model(PNG, url=linked), engine=engine) as (tool, network, requests):
            network.names["pictures.example"] = [[OTHER]]
            async with serving(network, answering(ok(PNG)), address=OTHER) as fetched:
                if told is None:
                    assert held(await tool.run({"prompt": "x"})) == PNG
                else:
                    with pytest.raises(UpstreamError, match=told):
                        await tool.run({"prompt": "x"})
                assert len(fetched) == len(hosts)
        assert sent in requests[0] if sent else b"response_format" not in requests[0]


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff\xe0", "image/jpeg"), (b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
     (b"GIF89a", "image/gif")],
)  # fmt: skip
async def test_a_picture_is_called_what_it_is(start: bytes, kind: str) -> None:
    """By its bytes; the service's word on it is not asked."""
    async with painting(image_model(start + b"rest")) as (tool, _, _):
        content = await tool.run({"prompt": "x"})
    assert isinstance(content, list)
    assert content[1] == Attachment(
        url=f"data:{kind};base64,{base64.b64encode(start + b'rest').decode()}", mime_type=kind
    )


IMAGE = b'{"data":[{"b64_json":"%s"}]}'
FAILURES: dict[str, tuple[bytes, str]] = {
    "401": (ok(b'{"error":{"message":"canary"}}', status="401 No"), "answered with 401: its key is not accepted"),
    "400": (ok(b'{"error":{"message":"canary"}}', status="400 No"), "answered with 400: the request is not accepted"),
    "429": (ok(b"", status="429 Wait"), "answered with 429: it is asked too often"),
    "503": (ok(b"canary", status="503 Oops"), "answered with 503: it failed"),
    "no json": (ok(b"canary"), "in a form that is not its own"),
    "no images": (ok(b'{"data":[]}'), "in a form that is not its own"),
    "an empty one": (ok(b'{"data":[{}]}'), "answered without an image"),
    "no base64": (ok(IMAGE % b"!canary"), "base64 that is none"),
    "no picture": (ok(IMAGE % base64.b64encode(b"<svg>canary</svg>")), "neither PNG, JPEG, GIF nor WebP"),
    "nothing in it": (ok(IMAGE % b""), "neither PNG, JPEG, GIF nor WebP"),
    "too large": (ok(IMAGE % base64.b64encode(PNG + bytes(2048))), "and at most 2048 are taken"),
    "much too large": (ok(IMAGE % (b"A" * 200_000)), "cannot be asked: the URL holds more than"),
    "depth": (ok(b'{"data":' + b"[" * 60_000), "in a form that is not its own"),
    "a redirect": (redirect("http://127.0.0.1/"), "cannot be asked: the server redirects"),
    "a file": (ok(b'{"data":[{"url":"file:///etc/passwd"}]}'), "cannot be fetched"),
    "silence": (b"", "cannot be asked: the URL's server failed"),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_service_that_fails_is_told_of_in_our_words(failure: str) -> None:
    """None of its own, which may be anything."""
    answer, told = FAILURES[failure]
    async with painting(answering(answer), max_bytes=2048, engine={"image_hosts": ["*"]}) as (tool, network, _):
        with pytest.raises(UpstreamError) as raised:
            await tool.run({"prompt": "x"})
    assert told in raised.value.detail
    assert "canary" not in raised.value.detail
    assert network.honeypot == 0


async def test_a_service_inside_is_asked_where_the_operator_says_so_and_its_links_are_not() -> None:
    """That a server is trusted to draw does not make its links ours."""
    network = StagedNetwork()
    network.names["draw.local"] = [[INTERNAL]]
    engine = {"kind": "openai", "url": "http://draw.local:7860", "private": True, "model": "m", "image_hosts": ["*"]}
    linked = image_model(PNG, url="http://draw.local:7860/1.png")
    async with serving(network, linked, address=INTERNAL) as requests:
        tool = image_gen(ImageGenConfig.model_validate({"engine": engine}), network=network)
        assert held(await tool.run({"prompt": "x"})) == PNG
        tool = image_gen(
            ImageGenConfig.model_validate({"engine": engine | {"response_format": "url"}}), network=network
        )
        with pytest.raises(UpstreamError, match="not among|not public"):
            await tool.run({"prompt": "x"})
        assert len(requests) == 2


@pytest.mark.parametrize(
    "engine",
    [
        {"kind": "openai"},
        {"kind": "openai", "model": "m", "url": "http://127.0.0.1:7860"},
        {"kind": "openai", "model": "m", "size": "large"},
        {"kind": "pattern", "pixels": 17},
        {"kind": "pattern", "pixels": 99_998},
        {"kind": "dream"},
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_start(engine: dict[str, Any]) -> None:
    """Where the operator reads it."""
    with pytest.raises(ValidationError):
        ImageGenConfig.model_validate({"engine": engine})


def test_the_installed_package_declares_it_with_what_it_touches() -> None:
    """A pattern touches nothing; a service and its picture hosts are the network."""
    spec = Registry().tool("image_gen").spec
    assert declaration_problems(spec) == []
    assert spec.asked(spec.config.read({})) == {}
    engine = {"kind": "openai", "model": "m", "image_hosts": ["*.blob.example"]}
    assert spec.asked(spec.config.read({"engine": engine})) == {"network": ["https://api.openai.com", "*.blob.example"]}
