"""The page about this plugin says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from llama_stack_meta_reference.config import MetaReferenceConfig, ModelConfig
from llama_stack_meta_reference.inference.metrics import families

from llama_stack.distribution import Distribution

PAGE = Path(__file__).parents[3] / "docs" / "providers" / "meta-reference.md"


def test_the_example_is_a_distribution_that_is_accepted() -> None:
    """It is what people copy."""
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    distribution = Distribution.model_validate(yaml.safe_load(example))
    (entry,) = distribution.providers["inference"]
    assert MetaReferenceConfig.model_validate(entry.config).aliases


def test_every_setting_has_its_row_with_its_default() -> None:
    """A setting that is not on the page does not exist for operators, and a wrong default misleads them."""
    settings = PAGE.read_text(encoding="utf-8").split("\n## ")[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", settings, re.MULTILINE))
    assert rows.keys() == ModelConfig.model_fields.keys()
    for name, field in ModelConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if default is not None and not field.is_required():
            assert rows[name].strip("` ") == str(default)


def test_every_metric_has_its_row() -> None:
    """Operators write their alerts from the page."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Metrics")[1]
    rows = "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    kept = {metric.name + ("_total" if metric.type == "counter" else "") for metric in families({})}
    assert {f"llama_stack_engine_{name}" for name in re.findall(r"`(\w+)`", rows)} == kept
