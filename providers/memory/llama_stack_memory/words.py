"""The words of queries and of texts, which a keyword search compares."""

from __future__ import annotations

import re
from unicodedata import normalize

MAX_WORDS = 64
"""Different words of a query that count."""
ENOUGH = 0.4
"""The share of a query's words that a chunk needs to count as found by them in a hybrid search.

Fusion by ranks takes the first hit of each list for equally good. A question put in other words than its answer has
hits that share one word with it by chance, and without this rule they displace what was found by meaning."""
_ACCENTS = "\u0300-\u036f"
_WORD = re.compile(rf"[^\W_](?:[^\W_]|[{_ACCENTS}])*")
"""Letters and digits, with accents that stand behind their letter; as SQLite's unicode61 has it."""
_ACCENT = re.compile(f"[{_ACCENTS}]")
_STOP_WORDS = """
a about after all also am an and any are as at be because been before being but by can could did do does doing for from
get had has have having he her here hers him his how i if in into is it its just me more most my no not of off on or our
ours out over own same she should so some such than that the their theirs them then there these they this those through
to too under until up very was we were what when where which while who whom why will with would you your yours
s t re ve ll d m don
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that say nothing of what an English question is about, and pieces of words that an apostrophe cuts off.

A question has many of them and the passage that answers it few, so that each would count as rare."""


def query_words(text: str) -> list[str]:
    """The different words of a text in lower case, in order, without stop words unless there are no others."""
    words = list(dict.fromkeys(_WORD.findall(normalize("NFC", text).lower())))
    telling = [word for word in words if word not in STOP_WORDS]
    return (telling or words)[:MAX_WORDS]


def plain_words(text: str) -> str:
    """All words of a text, in lower case and without accents, with a space between them.

    A search engine that has ideas of its own about numbers, addresses and hyphens finds none to have them about.
    """
    return " ".join(_WORD.findall(normalize("NFC", _ACCENT.sub("", normalize("NFD", text.lower())))))
