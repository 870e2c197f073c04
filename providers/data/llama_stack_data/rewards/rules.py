"""Rewards by rules: what can be said of an answer without understanding it.

Each rule has a value from 0 to 1, and the score is the sum of the values, each times the rule's weight. Rules see the
answer's text and nothing else. All of them take linear time in its length.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, assert_never

import re2

from llama_stack.apis.common import Dialog, Message

from ..config import ContainsRule, EndingRule, JsonRule, LengthRule, RegexRule, RepetitionRule, Rule, RulesModel
from ..text import text_of

Value = Callable[[str], float]
"""From 0 to 1: how well a text keeps to a rule."""
ENDS = frozenset(".!?…。！？։؟।")  # noqa: RUF001  # other scripts' marks look like ours, and are meant
"""Marks that end a sentence, of several scripts."""
_CLOSING = "\"'”’»)]}*_`」』）】"  # noqa: RUF001  # as above
"""What may stand after such a mark."""
_WORD = re.compile(r"\w+")


class Rules:
    """One reward model made of rules."""

    def __init__(self, model: RulesModel) -> None:
        self._rules = [(rule.weight, _value_of(rule)) for rule in model.rules]
        self.metadata: Mapping[str, Any] = {"rules": [rule.rule for rule in model.rules]}

    async def scores(self, dialog: Dialog, answers: Sequence[Message]) -> list[float]:
        """The score of each answer; the dialog is not looked at."""
        return await asyncio.to_thread(lambda: [self.score(text_of(answer.content)) for answer in answers])

    def score(self, text: str) -> float:
        """The sum of the rules' weighted values."""
        return sum((weight * value(text) for weight, value in self._rules), 0.0)


def _value_of(rule: Rule) -> Value:
    match rule:
        case LengthRule():
            return partial(length, of=rule.of, at_least=rule.at_least, at_most=rule.at_most)
        case RegexRule():
            return _search(rule.pattern)
        case ContainsRule():
            return partial(contains, texts=rule.texts, count=rule.count, ignore_case=rule.ignore_case)
        case JsonRule():
            return partial(is_json, keys=rule.keys)
        case RepetitionRule():
            return partial(variety, words=rule.words)
        case EndingRule():
            return ends_properly
        case _:
            assert_never(rule)


def _search(pattern: str) -> Value:
    # RE2 never backtracks: a text cannot make a pattern slow (github.com/google/re2/wiki/WhyRE2)
    compiled = re2.compile(pattern)
    return lambda text: float(compiled.search(text) is not None)


def length(text: str, *, of: str, at_least: int, at_most: int) -> float:
    """1 within the range; below it the share of the least that is there, above it the share that was allowed."""
    count = len(text) if of == "characters" else sum(1 for _ in _WORD.finditer(text))
    if count < at_least:
        return count / at_least
    return 1.0 if count <= at_most else at_most / count


def contains(text: str, *, texts: Sequence[str], count: str, ignore_case: bool) -> float:
    """How many of the texts are there: the share of them, or whether any is, or whether none is."""
    held = text.casefold() if ignore_case else text
    found = sum((wanted.casefold() if ignore_case else wanted) in held for wanted in texts)
    if count == "all":
        return found / len(texts)
    return float((found > 0) == (count == "any"))


def is_json(text: str, *, keys: Sequence[str]) -> float:
    """Whether the text is JSON, and, where keys are asked for, an object with these."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return 0.0
    return float(not keys or (isinstance(value, dict) and all(key in value for key in keys)))


def variety(text: str, *, words: int) -> float:
    """The share of different runs of so many words among all of them; a text with fewer words repeats nothing."""
    said = [word[0].casefold() for word in _WORD.finditer(text)]
    runs = [tuple(said[start : start + words]) for start in range(len(said) - words + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def ends_properly(text: str) -> float:
    """Whether a text ends as texts do, and not in the middle of a sentence or of a block of code."""
    stripped = text.rstrip()
    fences = sum(line.lstrip().startswith("```") for line in stripped.splitlines())
    if fences % 2:
        return 0.0
    if fences and stripped.endswith("```"):
        return 1.0
    return float(stripped.rstrip(_CLOSING)[-1:] in ENDS)
