"""Streams are read the same however the network cuts them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_stack.client.wire import Event, LineSplitter, events, lines
from llama_stack.errors import UpstreamError


async def _arriving(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def _events(*parts: bytes, max_bytes: int = 1000) -> list[Event]:
    return [event async for event in events(_arriving(parts), max_bytes=max_bytes)]


@given(
    texts=st.lists(st.text(alphabet="ab:é ", max_size=5), max_size=6),
    ends=st.lists(st.sampled_from([b"\n", b"\r", b"\r\n"]), min_size=6, max_size=6),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_lines_do_not_depend_on_how_the_bytes_arrive(texts: list[str], ends: list[bytes], cuts: list[int]) -> None:
    """A CR LF, or one character's bytes, may be split between two pieces; 100 random cuttings a run."""
    body = b"".join(text.encode() + end for text, end in zip(texts, ends, strict=False))
    parts = [body[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(body)], strict=True)]
    splitter = LineSplitter(1000)
    found = [line for part in parts for line in splitter.feed(part)]
    # an empty line ended by LF after one ended by CR is the one case in which the text itself is ambiguous
    expected = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    assert found == expected
    assert splitter.rest() == b""


@pytest.mark.anyio
async def test_an_event_has_its_kind_and_its_lines_of_data() -> None:
    """The fields that the standard defines for us: event, data; comments, ids and a byte order mark are passed over."""
    body = b"\xef\xbb\xbf: hello\nid: 7\nevent: error\ndata: a\ndata:b\n\ndata: c\n\nevent: lonely\n\n"
    expected = [Event("error", b"a\nb"), Event("message", b"c")]
    assert await _events(body) == expected
    assert await _events(*(bytes([byte]) for byte in body)) == expected


def test_an_empty_line_after_a_split_line_end_is_not_lost() -> None:
    """The LF of a CR LF that comes alone belongs to it, and the next one does not: it ends an event."""
    splitter = LineSplitter(1000)
    assert [line for part in (b"a\r", b"\n", b"", b"\n", b"b\n") for line in splitter.feed(part)] == [b"a", b"", b"b"]


@pytest.mark.anyio
async def test_an_event_that_the_end_cuts_off_is_dropped() -> None:
    """The standard discards it: half an event is not a shorter event."""
    assert await _events(b"data: a\n\ndata: b\n") == [Event("message", b"a")]


@pytest.mark.anyio
async def test_an_item_over_the_limit_is_refused() -> None:
    """A server that never ends a line must not fill the client's memory."""
    with pytest.raises(UpstreamError, match="more than 10 bytes"):
        await _events(b"data: 123", b"45678", max_bytes=10)
    with pytest.raises(UpstreamError, match="more than 10 bytes"):
        await _events(b"data: 1234\n" * 4, max_bytes=10)


@pytest.mark.anyio
async def test_json_lines_skip_empty_ones_and_keep_a_last_one_without_its_end() -> None:
    """A body that was written by hand, or by a server on another system, is still read."""
    found = [line async for line in lines(_arriving([b'{"a":1}\r', b'\n\n"b"\n3']), max_bytes=100)]
    assert found == [b'{"a":1}', b'"b"', b"3"]
