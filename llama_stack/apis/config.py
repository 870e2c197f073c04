"""The base of everything that a distribution's YAML configures."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of every configuration model: unknown keys are refused, the text below a field documents it.

    Values are validated strictly as YAML wrote them; a value that came from an environment variable is a string that
    pydantic converts to the field's type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class NoConfig(Config):
    """For providers that have nothing to configure."""
