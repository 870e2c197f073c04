"""A picture without a model: a pattern whose colours and waves are taken from a text's hash, as a PNG.

It stands in for an image model where there is none, and the file says so itself. The same text and seed give the same
pixels on every machine: all of it is whole numbers (the packing may differ with the machine's zlib).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from hashlib import shake_256

COMMENT = "A pattern made from the words of a prompt; no image model drew it."
WAVES = 5
_COLOURS = 4
"""Between which the palette runs, and back."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def pattern(text: str, seed: int, pixels: int) -> bytes:
    """A square PNG of so many pixels a side, which is an even number."""
    numbers = shake_256(f"{seed}:{text}".encode()).digest(3 * _COLOURS + 3 * WAVES)
    colours = [numbers[3 * n : 3 * n + 3] for n in range(_COLOURS)]
    waves = [numbers[3 * n : 3 * n + 3] for n in range(_COLOURS, _COLOURS + WAVES)]
    half = pixels // 2
    scale = max(1, 256 // half)  # a small picture has as many waves as one of 512 pixels
    upper = [bytes([0]) + row + row[::-1] for row in _quarter(waves, half, scale)]
    header = struct.pack(">IIBBBBB", pixels, pixels, 8, 3, 0, 0, 0)  # eight bits a pixel, by palette
    return _SIGNATURE + b"".join(
        [
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", _palette(colours)),
            _chunk(b"tEXt", b"Comment\0" + COMMENT.encode("latin-1")),
            _chunk(b"IDAT", zlib.compress(b"".join([*upper, *upper[::-1]]), 6)),
            _chunk(b"IEND", b""),
        ]
    )


def _quarter(waves: list[bytes], half: int, scale: int) -> Iterator[bytes]:
    """The upper left quarter, row by row: the sum of triangle waves that run in several directions."""
    slopes = [(wave[0] % 9 - 4, wave[1] % 9 - 4 or 5, wave[2]) for wave in waves]
    for y in range(half):
        starts = [(across, down * y * scale + phase) for across, down, phase in slopes]
        yield bytes(
            sum(abs((start + across * x * scale) % 512 - 256) for across, start in starts) % 256 for x in range(half)
        )


def _palette(colours: list[bytes]) -> bytes:
    """256 colours in a ring through these."""
    entries = []
    for index in range(256):
        place, between = divmod(index * len(colours), 256)
        one, next_one = colours[place], colours[(place + 1) % len(colours)]
        entries += [(a * (256 - between) + b * between) // 256 for a, b in zip(one, next_one, strict=True)]
    return bytes(entries)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
