"""What server and workers say to each other: nothing is lost on the way, and nothing broken gets through."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.frames import (
    LARGEST_BODY,
    Connection,
    FrameError,
    Kind,
    PeerGoneError,
    pack_picked,
    pack_step,
    unpack_picked,
    unpack_step,
)
from llama_stack_meta_reference.inference.sampler import Choice, SampledToken

BATCH = Batch(
    tokens=[5, 128_255, 0, 7], starts=[0, 130_000], counts=[3, 1], tables=[[3], [1, 2, 2_000_000]], sampled=[2, 3]
)
CHOICES = [Choice(wants_logprobs=True), Choice(False, True, 0.7, 40, 0.9, 0.123456789012345)]
PICKED = [SampledToken(9, -0.25, ((9, -0.25), (3, -1.5))), None, SampledToken(0), SampledToken(1, -0.5, ())]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Connection]]:
    ours, theirs = socket.socketpair()
    connection = Connection(theirs)
    yield ours, connection
    ours.close()
    connection.close()


@pytest.mark.parametrize(
    ("batch", "choices"),
    [(BATCH, CHOICES), (BATCH, [Choice(), Choice()]), (Batch([1], [0], [1], [[0]], []), []), (Batch(), [])],
)
def test_a_step_arrives_as_it_was_sent(batch: Batch, choices: list[Choice]) -> None:
    """Chance in full width: the same number must pick the same token wherever the network runs."""
    assert unpack_step(pack_step(batch, choices)) == (batch, choices)


@pytest.mark.parametrize("picked", [PICKED, [], [None]])
def test_picked_tokens_arrive_as_they_were_sent(picked: list[SampledToken | None]) -> None:
    """Scores too, and the mark of logits that were not finite."""
    assert unpack_picked(pack_picked(picked, [4, 9]), len(picked), 10, 2) == (picked, [4, 9])


def _picked(body: bytes) -> object:
    return unpack_picked(body, len(PICKED), 10)


@pytest.mark.parametrize(("body", "unpack"), [(pack_step(BATCH, CHOICES), unpack_step), (pack_picked(PICKED), _picked)])
def test_a_broken_body_is_an_error_and_never_a_crash(body: bytes, unpack: Callable[[bytes], object]) -> None:
    """Cut at every place, lengthened, and with every count changed."""
    for end in range(len(body)):
        with pytest.raises(FrameError):
            unpack(body[:end])
    with pytest.raises(FrameError):
        unpack(body + b"\0")
    chance = random.Random(0)
    survived = 0
    for _ in range(3000):
        broken = bytearray(body)
        broken[chance.randrange(len(body))] = chance.randrange(256)
        try:
            unpack(bytes(broken))
            survived += 1
        except FrameError:
            pass
    assert survived < 3000


@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 10), (5, 10), (4, 9)])
def test_an_answer_to_another_question_is_refused(rows: int, vocabulary: int) -> None:
    """Too few tokens, too many, and one that the tokenizer does not have."""
    with pytest.raises(FrameError):
        unpack_picked(pack_picked(PICKED), rows, vocabulary)


def test_frames_arrive_in_order_however_they_are_cut(ends: tuple[socket.socket, Connection]) -> None:
    """A socket hands over bytes, not frames."""
    ours, connection = ends
    sender = Connection(ours)
    bodies = [b"", b"x", bytes(300_000), b"last"]

    def send() -> None:
        for body in bodies:
            sender.send(Kind.STEP, body)

    thread = threading.Thread(target=send)
    thread.start()
    assert [connection.receive() for _ in bodies] == [(Kind.STEP, body) for body in bodies]
    thread.join()
    for byte in b"\x02\x00\x00\x00\x09{}":
        assert connection.arrived() == []
        ours.send(bytes([byte]))
    (frame,) = connection.arrived()
    assert frame.json() == {}


@pytest.mark.parametrize("header", [b"\xff\xff\xff\xff\x03", b"\x00\x00\x00\x00\xc8", b"HTTP/1.1 400 Bad Request"])
def test_what_is_no_frame_is_refused_before_it_is_stored(ends: tuple[socket.socket, Connection], header: bytes) -> None:
    """A length of four gigabytes, a kind that there is not, another protocol."""
    ours, connection = ends
    ours.send(header)
    with pytest.raises(FrameError, match="a frame of kind"):
        connection.receive()


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_control_frame_holds_an_object(ends: tuple[socket.socket, Connection], body: bytes) -> None:
    """Deep nesting is refused like the rest."""
    ours, connection = ends
    Connection(ours).send(Kind.FACTS, body)
    with pytest.raises(FrameError, match="a control frame"):
        connection.receive().json()


@pytest.mark.parametrize(("sent", "cause"), [(b"", "closed"), (b"\x05\x00\x00\x00\x03ab", "in the middle of a frame")])
def test_the_end_of_the_other_side_is_noticed(ends: tuple[socket.socket, Connection], sent: bytes, cause: str) -> None:
    """Between two frames and within one; and who writes to it learns it too."""
    ours, connection = ends
    ours.send(sent)
    ours.close()
    with pytest.raises(PeerGoneError, match=cause):
        connection.receive()
    with pytest.raises(PeerGoneError):
        connection.send(Kind.DONE)


def test_a_side_that_reads_nothing_holds_nobody_up(ends: tuple[socket.socket, Connection]) -> None:
    """A stopped process takes what its socket holds, and then no more."""
    ours, _ = ends
    with pytest.raises(TimeoutError):
        Connection(ours).send(Kind.STEP, bytes(1 << 24), timeout_seconds=0.05)


def test_a_body_too_large_is_refused_where_it_is_made(
    ends: tuple[socket.socket, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side would take it for nonsense, and be ended for it."""

    class Huge(bytes):
        def __len__(self) -> int:
            return LARGEST_BODY + 1

    sent: list[Any] = []
    monkeypatch.setattr(socket.socket, "sendall", lambda *data: sent.append(data))
    with pytest.raises(FrameError, match="at most"):
        Connection(ends[0]).send(Kind.STEP, Huge())
    assert sent == []
