"""Draw docs/engine.svg from the first two engine tables of docs/performance.md: decode of every side, by streams.

python benchmarks/plot.py
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PICTURE = PAGE.with_name("engine.svg")
_ROW = re.compile(r"^\| (\d+) \| ([a-z0-9._ ]+) \| [\d.]+ \| ([\d.]+) \|", re.MULTILINE)
_COLOURS = {"ours": "#2f6f9f", "llama.cpp": "#c98b2b", "transformers": "#8a8a8a"}
_WIDTH, _LABEL, _BAR, _GAP, _TOP = 720, 150, 16, 28, 44


def decode_speeds(page: str) -> dict[int, list[tuple[str, float]]]:
    """Tokens a second of each side by the number of streams, as the tables of the 125 M network have them."""
    section = page.split("## The engine: `make bench-engine`")[1].split("1.2 billion weights")[0]
    found: dict[int, list[tuple[str, float]]] = {}
    for streams, side, speed in _ROW.findall(section):
        found.setdefault(int(streams), []).append((side, float(speed)))
    return found


def picture(speeds: dict[int, list[tuple[str, float]]]) -> str:
    """A bar a side, in groups by streams, all on one scale."""
    most = max(speed for rows in speeds.values() for _, speed in rows)
    lines, y = [], _TOP
    for streams, rows in speeds.items():
        lines.append(_text(12, y, f"{streams} stream{'s' * (streams > 1)}", weight="bold"))
        y += 8
        for side, speed in rows:
            owner = next((name for name in ("llama.cpp", "transformers") if side.startswith(name)), "ours")
            width = (_WIDTH - _LABEL - 70) * speed / most
            lines.append(_text(_LABEL - 8, y + 12, side, anchor="end"))
            lines.append(
                f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR - 3}" fill="{_COLOURS[owner]}"/>'
            )
            lines.append(_text(_LABEL + width + 6, y + 12, f"{speed:g}"))
            y += _BAR
        y += _GAP
    title = _text(12, 20, "Decode, tokens a second of all streams together, 125 M weights, 2 cores", weight="bold")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{y}" fill="white"/>', title, *lines, "</svg>", ""])


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(decode_speeds(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
