"""What a distribution may say about models, and how it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_stack_meta_reference.config import MetaReferenceConfig, ModelConfig
from pydantic import ValidationError

ONE: dict[str, Any] = {"m": {"checkpoint": "/models/m"}}


def test_a_model_needs_no_more_than_its_checkpoint() -> None:
    """The first distribution that anyone writes is three lines."""
    model = MetaReferenceConfig.model_validate({"models": ONE}).models["m"]
    assert (model.device, model.dtype, model.context_tokens) == ("auto", "auto", None)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"models": {}}, "at least 1 item"),
        ({}, "models\n  Field required"),
        ({"models": ONE, "aliases": {"m": "m"}}, "the alias 'm' is the name of a model"),
        ({"models": ONE, "aliases": {"a": "mm"}}, r"stands for 'mm', which is none of the models; did you mean 'm'\?"),
        ({"models": ONE, "aliases": {"a": "b", "b": "m"}}, "stands for 'b', which is none of the models"),
        ({"models": {"m": {"checkpoint": "builtin:tini"}}}, r"no checkpoint 'tini' ships .* did you mean 'tiny'\?"),
        ({"models": {"m": {"checkpoint": ""}}}, "at least 1 character"),
        ({"models": {"m": {"checkpoint": "x", "device": "gpu"}}}, "match pattern"),
        ({"models": {"m": {"checkpoint": "x", "device": "cuda:"}}}, "match pattern"),
        ({"models": {"m": {"checkpoint": "x", "dtype": "int2"}}}, "'float16', 'int8', 'int4' or 'float8'"),
        ({"models": {"m": {"checkpoint": "x", "kernels": "fast"}}}, "'auto', 'compiled' or 'plain'"),
        ({"models": {"m": {"checkpoint": "x", "context_tokens": 1}}}, "greater than or equal to 2"),
        ({"models": {"m": {"checkpoint": "x", "max_sequences": 0}}}, "greater than or equal to 1"),
        (
            {"models": {"m": {"checkpoint": "x", "context_tokens": 100, "cache_tokens": 99}}},
            "a cache of 99 tokens does not hold one context of 100; set at least 100",
        ),
        (
            {"models": {"m": {"checkpoint": "x", "tensor_parallel": 2, "cuda_graphs": "compiled"}}},
            "that is split are not compiled; set true, or tensor_parallel: 1",
        ),
        ({"models": {"m": {"checkpoint": "x", "quantize": True}}}, "Extra inputs are not permitted"),
        ({"models": {"": {"checkpoint": "x"}}}, "at least 1 character"),
        (
            {"models": {"m": {"checkpoint": "x", "adapters": {"a": "x", "b": "x"}, "max_adapters": 1}}},
            "2 adapters are named; set at least 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(config: dict[str, Any], said: str) -> None:
    """`llama-stack check` shows these words beside the line of the YAML."""
    with pytest.raises(ValidationError, match=f"(?s){said}"):
        MetaReferenceConfig.model_validate(config)


def test_each_alias_is_refused_at_its_own_place() -> None:
    """Faults carry the line of their own key, and all of them come in one run."""
    config = {"models": ONE, "aliases": {"right": "m", "{0}": "x", "m": "m"}}
    with pytest.raises(ValidationError) as refused:
        MetaReferenceConfig.model_validate(config)
    assert [(fault["loc"], fault["msg"][:15]) for fault in refused.value.errors()] == [
        (("aliases", "{0}"), "the alias '{0}'"),
        (("aliases", "m"), "the alias 'm' i"),
    ]


def test_checkpoints_are_found_in_the_package_the_home_and_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``builtin:`` needs no download; a relative path is relative to where the server was started."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelConfig(checkpoint="~/m").folder == tmp_path / "m"
    assert ModelConfig(checkpoint="models/m").folder == Path("models/m")
    assert ModelConfig(checkpoint="builtin:tiny").folder.parts[-3:] == (
        "llama_stack_meta_reference",
        "checkpoints",
        "tiny",
    )
