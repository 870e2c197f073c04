"""The page about this plugin says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from llama_stack_meta_reference.config import MetaReferenceConfig, ModelConfig, RewardConfig, RewardModelConfig
from llama_stack_meta_reference.inference.metrics import families
from llama_stack_meta_reference.post_training.config import PostTrainingConfig

from llama_stack.apis import Config
from llama_stack.distribution import Distribution

PAGE = Path(__file__).parents[3] / "docs" / "providers" / "meta-reference.md"


def test_the_examples_are_distributions_that_are_accepted() -> None:
    """They are what people copy."""
    examples = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    answering, scoring = (Distribution.model_validate(yaml.safe_load(example)).providers for example in examples)
    assert MetaReferenceConfig.model_validate(answering["inference"][0].config).aliases
    assert RewardConfig.model_validate(scoring["reward_scoring"][0].config).aliases


@pytest.mark.parametrize(("section", "config"), [("Settings", ModelConfig), ("Reward scoring", RewardModelConfig)])
def test_every_setting_has_its_row_with_its_default(section: str, config: type[Config]) -> None:
    """A setting that is not on the page does not exist for operators, and a wrong default misleads them."""
    settings = PAGE.read_text(encoding="utf-8").split(f"\n## {section}")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", settings, re.MULTILINE))
    assert rows.keys() == config.model_fields.keys()
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if default is not None and not field.is_required():
            assert rows[name].strip("` ") == str(default)


def test_every_setting_of_training_has_its_row_with_its_default() -> None:
    """As for a model's."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Training\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE))
    assert rows.keys() == PostTrainingConfig.model_fields.keys()
    for name, field in PostTrainingConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, int | str):
            assert rows[name].strip("` ") == str(default)


def test_every_metric_has_its_row() -> None:
    """Operators write their alerts from the page."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Metrics")[1].split("\n## ")[0]
    rows = "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    kept = {metric.name + ("_total" if metric.type == "counter" else "") for metric in families({})}
    assert {f"llama_stack_engine_{name}" for name in re.findall(r"`(\w+)`", rows)} == kept
