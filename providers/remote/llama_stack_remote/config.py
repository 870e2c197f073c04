"""Where the other stack is, and how long to wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from llama_stack.apis import Config
from llama_stack.apis.config import server_url


class RemoteConfig(Config):
    """Another stack that serves this API."""

    url: Annotated[str, AfterValidator(server_url)] = Field(max_length=2048)
    """Its address, such as ``http://10.0.0.7:8321``; the part after the host is put before every path."""
    api_key: SecretStr | None = None
    """The key that it asks for."""
    ca_file: Path | None = None
    """A PEM file with the authorities to trust for ``https``, in place of the system's."""
    connect_timeout_seconds: float = Field(default=5.0, gt=0, le=3600)
    """How long a connection may take to be made."""
    read_timeout_seconds: float = Field(default=600.0, gt=0, le=86_400)
    """How long it may send nothing; a plain answer comes in one piece, when all of it has been generated."""
