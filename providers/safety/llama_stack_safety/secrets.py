"""Secrets in text: keys whose form is published, and values of telling names that are too random to be words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import log2

MIN_ENTROPY_BITS = 3.0
"""Bits a character (Shannon 1948) from which on the value of a telling name counts as a secret."""
MIN_HEX_ENTROPY_BITS = 2.5
"""The same for hexadecimal values, whose alphabet is smaller."""

KEYS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "private key": r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----",
        "AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        "GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,100})\b",
        "GitLab token": r"\bglpat-[A-Za-z0-9_-]{20}\b",
        "Slack token": r"\bxox[abposr]-[A-Za-z0-9-]{10,80}\b",
        "Google API key": r"\bAIza[A-Za-z0-9_-]{35}\b",
        "Stripe key": r"\b[rs]k_live_[A-Za-z0-9]{20,100}\b",
        "Hugging Face token": r"\bhf_[A-Za-z0-9]{34}\b",
        "OpenAI key": r"\bsk-(?:proj-)?[A-Za-z0-9_-]{32,200}\b",
        "npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
        "PyPI token": r"\bpypi-[A-Za-z0-9_-]{50,250}\b",
        "JSON web token": r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{20,2000}",
        "password in a URL": r"\b[a-z][a-z0-9+.-]{1,15}://[^\s/:@]{1,100}:(?!\$|<|\{|\*|password@)[^\s/:@]{3,200}@[^\s/]",
    }.items()
}  # fmt: skip
"""Each kind of key and its form, as its issuer publishes it."""

_NAMED = re.compile(
    r"\b[\w.-]{0,40}(?:password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|credential|private[_-]?key)[\w-]{0,40}"
    r"['\"]?\s{0,3}(?::=|=>|[:=])\s{0,3}['\"]([^'\"\s]{8,200})['\"]",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"example|sample|placeholder|change.?me|your[_-]|dummy|redacted|<.*>|\$\{|\{\{|%\(|x{4,}|\*{3,}|\.{3}",
    re.IGNORECASE,
)
_HEX = re.compile(r"[0-9a-fA-F]+")


def secrets_in(text: str) -> Iterator[tuple[str, int]]:
    """The kind and the line of each secret; what it is stays where it stands."""
    for kind, form in KEYS.items():
        for match in form.finditer(text):
            yield kind, line_of(text, match.start())
    for match in _NAMED.finditer(text):
        if _is_random(match[1]):
            yield "named secret", line_of(text, match.start())


def line_of(text: str, position: int) -> int:
    """The number of the line, from 1, that a position is in."""
    return text.count("\n", 0, position) + 1


def entropy_bits(value: str) -> float:
    """Shannon's entropy of the characters of a non-empty value, in bits a character."""
    total = len(value)
    return -sum(count / total * log2(count / total) for count in Counter(value).values())


def _is_random(value: str) -> bool:
    if _PLACEHOLDER.search(value):
        return False
    least = MIN_HEX_ENTROPY_BITS if _HEX.fullmatch(value) else MIN_ENTROPY_BITS
    return entropy_bits(value) >= least and any(c.isdigit() or not c.isalnum() for c in value)
