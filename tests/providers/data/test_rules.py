"""Rewards by rules."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from llama_stack_data.config import RulesConfig
from llama_stack_data.plugin import start_rules
from pydantic import ValidationError

from llama_stack.apis import RewardScoring
from tests.providers.data.reward_rules import RewardRules, asked, scores_of
from tests.providers.data.stage import rules

pytestmark = pytest.mark.anyio

CONFIG = RulesConfig.read(
    {
        "models": {
            "plain": {
                "rules": [
                    {"rule": "length", "at_least": 2, "at_most": 8, "weight": 2},
                    {"rule": "ending"},
                    {"rule": "repetition", "weight": 0.5},
                ]
            },
            "json": {"rules": [{"rule": "json"}]},
        },
        "aliases": {"llama3_405b_reward": "plain"},
    }
)


class TestRules(RewardRules):
    """Everything that any provider must keep to."""

    model = "plain"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[RewardScoring]:
        async with start_rules(CONFIG) as rewards:
            yield rewards


class TestRulesByAlias(TestRules):
    """The name that the draft's clients send."""

    model = "llama3_405b_reward"

    async def test_an_alias_scores_as_its_model(self, rewards: RewardScoring) -> None:
        """It is the same model."""
        request = asked("Capital?", ["Oslo.", "The capital is Oslo."])
        by_alias = await self.score(rewards, request)
        self.model = "plain"
        assert by_alias == await self.score(rewards, request)
        assert scores_of(by_alias) == [[2 * 0.5 + 1 + 0.5, 2 + 1 + 0.5]]


@pytest.mark.parametrize(
    ("rule", "text", "value"),
    [
        ({"rule": "length", "at_least": 3, "at_most": 4}, "one two three", 1),
        ({"rule": "length", "at_least": 4}, "one, two", 0.5),
        ({"rule": "length", "at_most": 2}, "one two three four", 0.5),
        ({"rule": "length"}, "", 0),
        ({"rule": "length"}, "...", 0),
        ({"rule": "length", "of": "characters", "at_most": 3}, "日本語", 1),
        ({"rule": "regex", "pattern": r"^\d+$"}, "123", 1),
        ({"rule": "regex", "pattern": r"^\d+$"}, "12a", 0),
        ({"rule": "regex", "pattern": r"(?i)oslo"}, "It is OSLO.", 1),
        ({"rule": "contains", "texts": ["Oslo", "Norway"]}, "oslo, in Norway", 1),
        ({"rule": "contains", "texts": ["Oslo", "Norway"]}, "Oslo", 0.5),
        ({"rule": "contains", "texts": ["Oslo"], "ignore_case": False}, "oslo", 0),
        ({"rule": "contains", "texts": ["a b", "c"], "count": "any"}, "see", 0),
        ({"rule": "contains", "texts": ["a b", "c"], "count": "any"}, "a b", 1),
        ({"rule": "contains", "texts": ["sorry", "as an ai"], "count": "none"}, "Sorry!", 0),
        ({"rule": "contains", "texts": ["sorry", "as an ai"], "count": "none"}, "Yes.", 1),
        ({"rule": "contains", "texts": ["STRASSE"]}, "straße", 1),
        ({"rule": "json"}, ' {"a": [1, null]}\n', 1),
        ({"rule": "json"}, '{"a": 1} and so on', 0),
        ({"rule": "json"}, "NaN", 0),
        ({"rule": "json"}, "[" * 100_000, 0),
        ({"rule": "json", "keys": ["a"]}, '{"a": 1, "b": 2}', 1),
        ({"rule": "json", "keys": ["a", "c"]}, '{"a": 1, "b": 2}', 0),
        ({"rule": "json", "keys": ["a"]}, '["a"]', 0),
        ({"rule": "repetition"}, "to be or not to be", 1),
        ({"rule": "repetition", "words": 1}, "No no NO no", 0.25),
        ({"rule": "repetition"}, "", 1),
        ({"rule": "ending"}, "It is so.", 1),
        ({"rule": "ending"}, 'He said "so."  \n', 1),
        ({"rule": "ending"}, "(Is it?)", 1),
        ({"rule": "ending"}, "是的。", 1),
        ({"rule": "ending"}, "It is", 0),
        ({"rule": "ending"}, "", 0),
        ({"rule": "ending"}, "See:\n```python\nx = 1\n```", 1),
        ({"rule": "ending"}, "See:\n```python\nx = 1.", 0),
    ],
)
def test_a_rule_has_the_value_that_its_page_tells(rule: Mapping[str, Any], text: str, value: float) -> None:
    """From 0 to 1."""
    assert rules(rule).score(text) == value


def test_the_score_is_the_sum_of_weighted_values() -> None:
    """A negative weight is a penalty."""
    scorer = rules(
        {"rule": "length", "weight": 2},
        {"rule": "regex", "pattern": "bad", "weight": -5},
        {"rule": "contains", "texts": ["good", "fine"], "weight": 0.5},
    )
    assert scorer.score("good") == 2 + 0.25
    assert scorer.score("bad") == 2 - 5
    assert scorer.score("") == 0


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|a)*b", r"(\w*)*\W", r"(x?){50}x{50}"])
def test_no_answer_makes_a_pattern_slow(pattern: str) -> None:
    """Each of these takes Python's own ``re`` longer than the universe is old."""
    assert rules({"rule": "regex", "pattern": pattern}).score("a" * 100_000 + "!") in (0.0, 1.0)


def test_a_long_answer_is_scored_by_every_rule() -> None:
    """A million words; nothing is quadratic."""
    scorer = rules(
        *({"rule": name} for name in ("length", "json", "repetition", "ending")), {"rule": "contains", "texts": ["zz"]}
    )
    assert scorer.score("word " * 1_000_000) == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"models": {}}, "models"),
        ({"models": {"m": {"rules": []}}}, "rules"),
        ({"models": {"m": {"rules": [{"rule": "lenght"}]}}}, "'length'"),
        ({"models": {"m": {"rules": [{"rule": "length", "at_least": 5, "at_most": 4}]}}}, "swap them"),
        ({"models": {"m": {"rules": [{"rule": "regex", "pattern": "("}]}}}, "not a pattern of RE2"),
        ({"models": {"m": {"rules": [{"rule": "regex", "pattern": r"(a)\1"}]}}}, "not a pattern of RE2"),
        ({"models": {"m": {"rules": [{"rule": "contains", "texts": [""]}]}}}, "texts"),
        ({"models": {"m": {"rules": [{"rule": "json", "weight": float("inf")}]}}}, "weight"),
        ({"models": {"m": {"rules": [{"rule": "json"}]}}, "aliases": {"a": "n"}}, "none of the models"),
        ({"models": {"m": {"rules": [{"rule": "json"}]}}, "aliases": {"m": "m"}}, "is the name of a model"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config: Mapping[str, Any], words: str) -> None:
    """At the start, not with the first answer."""
    with pytest.raises(ValidationError) as error:
        RulesConfig.model_validate_json(json.dumps(config))
    assert words in str(error.value)
