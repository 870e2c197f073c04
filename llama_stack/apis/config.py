"""The base of everything that a distribution's YAML configures."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from ..errors import listed, nearest

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
"""Names that are safe as a folder, a label and a part of a URL."""


class Config(BaseModel):
    """Base of every configuration model: unknown keys are refused, the text below a field documents it.

    Values are validated strictly as YAML wrote them; a value that came from an environment variable is a string that
    pydantic converts to the field's type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that a checked distribution describes.

        As JSON, which is how the check reads it: there a list is a tuple, and a text a path, also to a strict field.
        """
        return cls.model_validate_json(json.dumps(values))


class NoConfig(Config):
    """For providers that have nothing to configure."""


class InnerProvider(Config):
    """A provider of the same API that a provider stands before; clients reach it through that one alone.

    A config has one as a field, or several in a tuple, and the start function takes an ``Inner`` to start them.
    """

    provider: str = Field(pattern=NAME_PATTERN, max_length=63)
    """The name under which an installed plugin declares it."""
    id: str | None = Field(default=None, pattern=NAME_PATTERN, max_length=63)
    """What it is called here; its provider name when left out. Two of one name need two ids."""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """Its own settings."""

    @property
    def name(self) -> str:
        """What it is called here."""
        return self.id or self.provider


def checked_aliases(title: str, aliases: dict[str, str], names: Collection[str] | None) -> dict[str, str]:
    """Aliases each of which stands for one of ``names``, and bears none of them.

    For a validator of the model ``title``: what is wrong is refused at the line of its own alias. Without ``names``,
    which were refused then, nothing is checked.
    """
    if names is None:
        return aliases
    faults = [
        InitErrorDetails(type=PydanticCustomError("alias", "{cause}", {"cause": cause}), loc=(alias,), input=model)
        for alias, model in aliases.items()
        for cause in _alias_faults(alias, model, names)
    ]
    if faults:  # each at its own line, where a plain ValueError would stand at the first
        raise ValidationError.from_exception_data(title, faults)
    return aliases


def _alias_faults(alias: str, model: str, names: Collection[str]) -> Iterator[str]:
    if alias in names:
        yield f"the alias {alias!r} is the name of a model; remove it, or rename the model"
    elif model not in names:
        hint = nearest(model, names)
        yield f"the alias {alias!r} stands for {model!r}, which is none of the models{hint}; models: {listed(names)}"


def server_url(url: str) -> str:
    """The address of a server as it was given. Raises ``ValueError``, without repeating it, where it is none."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number or too large
        is_address = False
    if not is_address or parts.username or parts.password or re.search(r"[\s\x00-\x1f\x7f?#]", url):
        raise ValueError(
            "this is not the address of a server; write http://HOST:PORT or https://HOST:PORT, "
            "without user, query or fragment"
        )
    return url
