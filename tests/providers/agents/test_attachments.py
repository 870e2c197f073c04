"""Texts that a client attaches, and how much of them a turn reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_stack.apis.common import Attachment, Message
from llama_stack.errors import InvalidRequestError, UpstreamError, UrlNotAllowedError
from tests.providers.agents.stage import stage

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])


def text(url: str, mime_type: str = "text/plain") -> Attachment:
    return Attachment(url=url, mime_type=mime_type)


@both
async def test_all_attached_texts_together_are_bounded(streamed: bool, tmp_path: Path) -> None:
    """Each may be small, and a request can name ten thousand of them."""
    (tmp_path / "page").write_bytes(b"x" * 1000)
    pages = [text(f"file://{tmp_path}/page")] * 10
    config = {"fetch": {"file_roots": [tmp_path]}, "max_attached_bytes": 5000}
    async with stage(["Ok."], config=config) as on:
        with pytest.raises(InvalidRequestError, match="more than 5000 bytes together"):
            await on.turn(Message.user(list(pages)), streamed=streamed)
        await on.turn(Message.user(list(pages[:5])), streamed=streamed)
    assert on.prompt()[-1].content == ["x" * 1000] * 5


@both
async def test_earlier_turns_count(streamed: bool) -> None:
    """They are read again each time, for the stack keeps no turns."""
    note = Message.user([text("data:text/plain," + "x" * 900)])
    async with stage(["Ok."], config={"max_attached_bytes": 1000}) as on:
        first = await on.turn(note, streamed=streamed)
        with pytest.raises(InvalidRequestError, match="more than 1000 bytes"):
            await on.turn(note, history=[first], streamed=streamed)


@both
@pytest.mark.parametrize(
    ("mime_type", "is_read"),
    [
        ("text/plain", True),
        ("TEXT/Markdown; charset=utf-8", True),
        ("application/json", True),
        ("image/png", False),
        ("application/octet-stream", False),
        ("", False),
    ],
)
async def test_texts_are_read_and_all_else_goes_on_as_it_is(mime_type: str, is_read: bool, streamed: bool) -> None:
    """Whether a model can see a picture is the model's to say."""
    attached = text("data:text/plain;base64,aGk=", mime_type)
    async with stage(["Ok."]) as on:
        await on.turn(Message.user([attached]), streamed=streamed)
    assert on.prompt()[-1].content == (["hi"] if is_read else [attached])


@both
async def test_bytes_that_are_no_text_are_shown_as_such(streamed: bool) -> None:
    """What the client calls a text need not be one."""
    async with stage(["Ok."]) as on:
        await on.turn(Message.user([text("data:text/plain;base64,/w==")]), streamed=streamed)
    assert on.prompt()[-1].content == ["\ufffd"]


@both
@pytest.mark.parametrize(
    "url",
    [
        "data:text/plain;base64,%%%",
        "data:;;,x",
        "data:text/plain",
        "data:text/plain,%41" + "A" * 200,
        "data:text/plain;base64," + "QUFB" * 60,
    ],
    ids=["not base64", "no type", "no comma", "too long", "too long packed"],
)
async def test_a_data_url_that_cannot_be_read_is_refused_before_the_model_is_asked(url: str, streamed: bool) -> None:
    """Malformed, or above the cap of one attachment."""
    async with stage(["never"], config={"fetch": {"max_bytes": 100}}) as on:
        with pytest.raises(UrlNotAllowedError):
            await on.turn(Message.user([text(url)]), streamed=streamed)
        assert on.model.requests == []


@both
async def test_a_file_outside_of_the_roots_is_refused_also_through_a_link(streamed: bool, tmp_path: Path) -> None:
    """Roots are the operator's; a link inside of one is somebody else's."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("canary")
    (root / "link").symlink_to(tmp_path / "secret")
    async with stage(["never"], config={"fetch": {"file_roots": [root]}}) as on:
        for name in ("root/link", "secret", "root/../secret", "root"):
            with pytest.raises((UrlNotAllowedError, UpstreamError)):
                await on.turn(Message.user([text(f"file://{tmp_path}/{name}")]), streamed=streamed)
        assert on.model.requests == []
