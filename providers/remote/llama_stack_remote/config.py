"""Where the other stack is, and how long to wait for it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from llama_stack.apis import Config


class RemoteConfig(Config):
    """Another stack that serves this API."""

    url: str = Field(max_length=2048)
    """Its address, such as ``http://10.0.0.7:8321``; the part after the host is put before every path."""
    api_key: SecretStr | None = None
    """The key that it asks for."""
    ca_file: Path | None = None
    """A PEM file with the authorities to trust for ``https``, in place of the system's."""
    connect_timeout_seconds: float = Field(default=5.0, gt=0, le=3600)
    """How long a connection may take to be made."""
    read_timeout_seconds: float = Field(default=600.0, gt=0, le=86_400)
    """How long it may send nothing; a plain answer comes in one piece, when all of it has been generated."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("is no address of a server; write http://HOST:PORT or https://HOST:PORT")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("has a user, a query or a fragment; write http://HOST:PORT, and the key under api_key")
        return url
