"""The built-in detector of prompt injection: rules over plain text, and likeness to known attacks.

It needs no checkpoint. It knows wordings and no meaning: a paraphrase that it never saw passes it, and it is no
boundary (what an agent may do is bounded by its grant). Text is judged in its plain form and, where a part of it is
base64 or spaced-out letters, in the form that this hides.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import sqrt

from .attacks import EXAMPLES, RULES

NGRAM_CHARACTERS = 4
WINDOW_WORDS = 30
"""Longer sentences are looked at in windows of this length, each half over the next."""
MAX_CHARACTERS = 100_000
"""Longer texts are not judged: the time that this takes grows with their length."""

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
_TAGS = re.compile("[\U000e0000-\U000e007f]")
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{24,}={0,2}")
_SPACED = re.compile(r"(?<!\w)(?:\w[ .\-_*]){4,}\w(?!\w)")
_WORD = re.compile(r"[^\W_]+")
_SENTENCE = re.compile(r"[^.!?;\n]+")


@dataclass(frozen=True)
class Finding:
    """The strongest sign of an attack that a text holds."""

    score: float
    """0 to 1; 1 for a rule that matches, else the likeness to the nearest known attack."""
    sign: str
    """The rule, or the known attack that is nearest."""


def detect(text: str) -> Finding:
    """The strongest sign in a text of at most ``MAX_CHARACTERS``. Raises ``ValueError`` for a longer one."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the text has {len(text)} characters, and at most {MAX_CHARACTERS} are judged")
    if _TAGS.search(text):
        return Finding(1.0, "rule invisible-tags")
    strongest = Finding(0.0, "nothing")
    for form in _forms(text):
        for name, rule in RULES.items():
            if rule.search(form):
                return Finding(1.0, f"rule {name}")
        nearest = max(map(_likeness, _passages(form)), key=lambda found: found.score, default=strongest)
        strongest = max(strongest, nearest, key=lambda found: found.score)
    return strongest


def _forms(text: str) -> Iterator[str]:
    yield _plain(text)
    for match in _BASE64.finditer(text):
        try:
            hidden = base64.b64decode(match[0], validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            continue
        yield _plain(hidden)
    unspaced = _SPACED.sub(lambda match: re.sub(r"[ .\-_*]", "", match[0]), text)
    if unspaced != text:
        yield _plain(unspaced)


def _plain(text: str) -> str:
    """Compatibility characters folded (UAX 15, NFKC), invisible ones removed, lower case, single spaces."""
    folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold().replace("\u2019", "'")
    return re.sub(r"[^\S\n]+", " ", folded)


def _passages(text: str) -> Iterator[str]:
    """Each sentence, a long one in windows: what stands around it must not dilute the part that matters."""
    for match in _SENTENCE.finditer(text):
        words = match[0].split()
        for start in range(0, max(1, len(words) - WINDOW_WORDS // 2), WINDOW_WORDS // 2):
            passage = " ".join(words[start : start + WINDOW_WORDS])
            if len(passage) >= 3 * NGRAM_CHARACTERS:
                yield passage


def _likeness(passage: str) -> Finding:
    """The cosine between n-gram counts of the passage and of the nearest known attack."""
    counts = _counts(passage)
    norm = _norm(counts)
    best = Finding(0.0, "nothing")
    for example, known, known_norm in _known():
        shared = sum(count * known[gram] for gram, count in counts.items() if gram in known)
        if shared and (score := shared / (norm * known_norm)) > best.score:
            best = Finding(score, f"like {example!r}")
    return best


@cache
def _known() -> tuple[tuple[str, Mapping[str, int], float], ...]:
    return tuple((example, counts, _norm(counts)) for example in EXAMPLES for counts in [_counts(_plain(example))])


def _counts(text: str) -> Counter[str]:
    words = " ".join(["", *_WORD.findall(text), ""])
    return Counter(words[i : i + NGRAM_CHARACTERS] for i in range(len(words) - NGRAM_CHARACTERS + 1))


def _norm(counts: Mapping[str, int]) -> float:
    return sqrt(sum(count * count for count in counts.values())) or 1.0
