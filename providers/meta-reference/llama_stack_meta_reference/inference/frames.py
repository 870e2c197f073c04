"""What the server and its workers say to each other, in frames over a socket pair that no one else holds.

A frame is a header (length of the body, kind) and a body of at most ``LARGEST_BODY``. Control frames hold JSON; the
frames of a step hold packed numbers, for they come a thousand times a second. Nothing is ever pickled, and every count
in a body is checked against the body's size before it is used.

    server -> worker   OPEN, LOAD, STEP, RESET, ADD_ADAPTER, REMOVE_ADAPTER
    worker -> server   FACTS, DONE, PICKED or FAILED, one for each of these; LOG at any time
"""

from __future__ import annotations

import json
import socket
import struct
from array import array
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from itertools import chain
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

from .batch import Batch
from .sampler import Choice, SampledToken

N = TypeVar("N")

LARGEST_BODY = 1 << 28
"""The step of 1,024 sequences with a million tokens each has a body of this size."""
_HEADER = struct.Struct("<IB")
_READ_BYTES = 1 << 18
_STEP = struct.Struct("<6I")  # tokens, sequences, adapters, blocks of all tables, sampled places, numbers of chance
_PICKED = struct.Struct("<4I")  # rows, alternatives of all rows, guessed tokens, log-probabilities
_IS_GREEDY, _WANTS_LOGPROBS = 1, 2
_NOT_FINITE = -1
_NOT_SCORED = -1


class Kind(IntEnum):
    """What a frame is."""

    OPEN = 1
    """Look at a checkpoint and plan the memory; answered by FACTS."""
    LOAD = 2
    """Load it; answered by DONE."""
    STEP = 3
    """Execute a step; answered by PICKED, or by DONE where another rank picks."""
    RESET = 4
    """Blank the cache; answered by DONE."""
    FACTS = 5
    DONE = 6
    PICKED = 7
    FAILED = 8
    """In place of any other answer: ``{"code", "detail"}``, the code null for what is no ``StackError``."""
    LOG = 9
    """A line for the server's log: ``{"logger", "level", "message"}``."""
    ADD_ADAPTER = 10
    """Read one, ``{"adapter", "folder"}``; answered by DONE."""
    REMOVE_ADAPTER = 11
    """Forget one, ``{"adapter"}``; answered by DONE."""


class Frame(NamedTuple):
    """One frame that has arrived whole."""

    kind: Kind
    body: bytes

    def json(self) -> dict[str, Any]:
        """The object in a control frame. Raises ``FrameError``."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise FrameError("a control frame that is no JSON") from error
        if not isinstance(value, dict):
            raise FrameError("a control frame that holds no object")
        return value


class FrameError(Exception):
    """What arrived is not what the other side sends."""


class PeerGoneError(Exception):
    """The other side has closed the socket, or ended."""


class Connection:
    """One end of a socket pair. One thread reads; any may send."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._buffer = bytearray()
        self._frames: deque[Frame] = deque()
        self._sending = Lock()

    def fileno(self) -> int:
        """For ``poll``."""
        return self._socket.fileno()

    def send(self, kind: Kind, body: bytes = b"", *, timeout_seconds: float | None = None) -> None:
        """Send one frame. Raises ``PeerGoneError``, and ``TimeoutError`` when it is not taken in time."""
        if len(body) > LARGEST_BODY:
            raise FrameError(f"a body of {len(body)} bytes; at most {LARGEST_BODY} are sent")
        with self._sending:
            self._socket.settimeout(timeout_seconds)
            try:
                self._socket.sendall(_HEADER.pack(len(body), kind) + body)
            except TimeoutError:
                raise
            except OSError as error:
                raise PeerGoneError(str(error)) from error

    def send_json(self, kind: Kind, value: dict[str, Any]) -> None:
        """Send a control frame."""
        self.send(kind, json.dumps(value).encode())

    def receive(self) -> Frame:
        """The next frame, waited for. Raises ``PeerGoneError`` at the end, ``FrameError`` for what is none."""
        while not self._frames:
            self._read(0)
        return self._frames.popleft()

    def arrived(self) -> list[Frame]:
        """What has arrived whole, without waiting; raises as ``receive`` does. Call it when ``poll`` says so."""
        self._read(socket.MSG_DONTWAIT)
        frames = [*self._frames]
        self._frames.clear()
        return frames

    def close(self) -> None:
        """Close the socket: the other side reads the end."""
        self._socket.close()

    def _read(self, flags: int) -> None:
        try:
            read = self._socket.recv(_READ_BYTES, flags)
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerGoneError(str(error)) from error
        if not read:
            raise PeerGoneError("in the middle of a frame" if self._buffer else "the socket was closed")
        self._buffer += read
        while len(self._buffer) >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._buffer)
            if length > LARGEST_BODY or kind not in Kind.__members__.values():
                raise FrameError(f"a frame of kind {kind} and {length} bytes")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            self._frames.append(Frame(Kind(kind), bytes(self._buffer[_HEADER.size : end])))
            del self._buffer[:end]


def pack_step(batch: Batch, choices: Sequence[Choice]) -> bytes:
    """The body of a STEP."""
    tables = batch.tables
    adapters = batch.adapters if any(batch.adapters) else []
    chance = [number for c in choices if not c.is_greedy for number in (c.temperature, c.top_p, c.drawn)]
    flags = (_IS_GREEDY * c.is_greedy | _WANTS_LOGPROBS * c.wants_logprobs for c in choices)
    top_k = (c.top_k for c in choices)
    # A list first: an array takes that in one go, and any other iterable item by item.
    numbers = [*batch.tokens, *batch.starts, *batch.counts, *adapters, *map(len, tables)]
    numbers += chain.from_iterable(tables)
    numbers += chain(batch.sampled, flags, top_k)
    blocks = sum(map(len, tables))
    header = _STEP.pack(len(batch.tokens), len(tables), len(adapters), blocks, len(choices), len(chance))
    return header + array("i", numbers).tobytes() + array("d", chance).tobytes()


def unpack_step(body: bytes) -> tuple[Batch, list[Choice]]:
    """What ``pack_step`` packed. Raises ``FrameError``."""
    reader = _Reader(body, _STEP)
    tokens, sequences, adapters, blocks, sampled, chances = reader.counts
    numbers, chance = reader.rest(tokens + 3 * sequences + adapters + blocks + 3 * sampled, chances)
    batch = Batch(numbers.take(tokens), numbers.take(sequences), numbers.take(sequences))
    batch.adapters = numbers.take(adapters)
    lengths = numbers.take(sequences)
    if (
        sum(batch.counts) != tokens
        or sum(lengths) != blocks
        or min(lengths, default=0) < 0
        or adapters not in (0, sequences)
    ):
        raise FrameError("a step whose counts do not fit together")
    batch.tables = [numbers.take(length) for length in lengths]
    batch.sampled = numbers.take(sampled)
    flags, top_k = numbers.take(sampled), numbers.take(sampled)
    if 3 * sum(not flag & _IS_GREEDY for flag in flags) != chances:
        raise FrameError("a step whose choices do not fit together")
    choices = []
    for flag, k in zip(flags, top_k, strict=True):
        wants_logprobs = bool(flag & _WANTS_LOGPROBS)
        if flag & _IS_GREEDY:
            choices.append(Choice(True, wants_logprobs))
        else:
            temperature, top_p, drawn = chance.take(3)
            choices.append(Choice(False, wants_logprobs, temperature, k, top_p, drawn))
    return batch, choices


def pack_picked(picked: Sequence[SampledToken | None], guessed: Sequence[int] = ()) -> bytes:
    """The body of a PICKED: the picked tokens, and those that the draft network guessed."""
    tokens, counts, others = [], [], []
    logprobs = []
    for one in picked:
        tokens.append(_NOT_FINITE if one is None else one.token)
        if one is None or one.logprob is None:
            counts.append(_NOT_SCORED)
        else:
            counts.append(len(one.alternatives))
            others += [token for token, _ in one.alternatives]
            logprobs += [one.logprob, *(logprob for _, logprob in one.alternatives)]
    header = _PICKED.pack(len(tokens), len(others), len(guessed), len(logprobs))
    return header + array("i", [*tokens, *counts, *others, *guessed]).tobytes() + array("d", logprobs).tobytes()


def unpack_picked(
    body: bytes, rows: int, vocabulary: int, guesses: int = 0
) -> tuple[list[SampledToken | None], list[int]]:
    """What ``pack_picked`` packed. Raises ``FrameError``, also unless there are so many tokens of the vocabulary."""
    reader = _Reader(body, _PICKED)
    found, others, guessed, logprobs = reader.counts
    numbers, scores = reader.rest(2 * found + others + guessed, logprobs)
    tokens, counts = numbers.take(found), numbers.take(found)
    scored = [count for count in counts if count != _NOT_SCORED]
    if found != rows or min(scored, default=0) < 0 or sum(scored) != others or len(scored) + others != logprobs:
        raise FrameError(f"{found} picked tokens where {rows} were asked for, or scores that do not fit them")
    if not all(_NOT_FINITE <= token < vocabulary for token in tokens):
        raise FrameError("a picked token that the vocabulary does not have")
    picked: list[SampledToken | None] = []
    for token, count in zip(tokens, counts, strict=True):
        if token == _NOT_FINITE:
            picked.append(None)
        elif count == _NOT_SCORED:
            picked.append(SampledToken(token))
        else:
            logprob, *best = scores.take(1 + count)
            picked.append(SampledToken(token, logprob, tuple(zip(numbers.take(count), best, strict=True))))
    drafted = numbers.take(guessed)
    if guessed != guesses or not all(0 <= token < vocabulary for token in drafted):
        raise FrameError(f"{guessed} guessed tokens where {guesses} were asked for, or unknown ones")
    return picked, drafted


class _Items(Generic[N]):
    """Numbers that are taken from the front."""

    def __init__(self, numbers: list[N]) -> None:
        self._numbers = numbers
        self._place = 0

    def take(self, count: int) -> list[N]:
        """The next ``count``; ``_Reader`` has seen to it that there are as many as will be taken."""
        self._place += count
        return self._numbers[self._place - count : self._place]


class _Reader:
    """A body of packed numbers: counts, then 32-bit integers, then 64-bit floats."""

    def __init__(self, body: bytes, header: struct.Struct) -> None:
        if len(body) < header.size:
            raise FrameError(f"a body of {len(body)} bytes, shorter than its header")
        self._body = body
        self._start = header.size
        self.counts: tuple[int, ...] = header.unpack_from(body)

    def rest(self, integers: int, floats: int) -> tuple[_Items[int], _Items[float]]:
        """The numbers. Raises ``FrameError`` unless the body holds exactly so many."""
        middle = self._start + 4 * integers
        if len(self._body) != middle + 8 * floats:
            raise FrameError(f"a body of {len(self._body)} bytes that does not fit its counts")
        whole, real = array("i"), array("d")
        whole.frombytes(self._body[self._start : middle])
        real.frombytes(self._body[middle:])
        return _Items(whole.tolist()), _Items(real.tolist())
