"""The keys of a distribution's YAML, as models: what each means, what it may hold and what it is when left out.

The configuration of a provider, tool, face or middleware is validated by the model that its plugin brings, not here.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from ..apis.config import NAME_PATTERN, Config
from ..tools import Permission

ORIGIN_PATTERN = r"^https?://[^/\s]+$"

Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=63)]
"""A lowercase name that is safe as a folder, a label and a part of a URL."""

PluginName = Annotated[str, Field(min_length=1, max_length=255)]
"""The name of an entry point, or of the package that brings it."""

Requirement = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(\[[A-Za-z0-9._, -]+\])?\s*([<>=!~][^;@\s]*)?$",
        max_length=255,
    ),
]
"""A package and its versions as pip takes them, such as ``llama-stack-keyword>=1.2,<2``: no URL, no option."""

Seconds = Annotated[float, Field(gt=0, le=86_400)]

_STORAGE_URL = re.compile(r"sqlite|sqlite::memory:|sqlite:///.+|postgresql://.+", re.DOTALL)


class ProviderEntry(Config):
    """One provider of an API."""

    provider: Name
    """The name under which an installed plugin declares the provider."""
    id: Name | None = None
    """What the provider is called in this distribution; its provider name when left out."""
    optional: bool = False
    """Whether the stack starts without it: its API then answers 503 with the reason, and the start is tried again."""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """The provider's own settings."""


class ToolEntry(Config):
    """One tool that agents may be given."""

    tool: Name
    """The name under which an installed plugin declares the tool."""
    id: Name | None = None
    """What it is called in this distribution, where one tool is listed several times; its own name when left out."""
    optional: bool = False
    """Whether the stack starts without it: a call then tells the model the reason, and the start is tried again."""
    permissions: tuple[Permission, ...] = ()
    """What the tool may touch: ``network``, ``files``, ``processes``. One that asks for more is refused."""
    timeout_seconds: Seconds | None = None
    """How long a call may take; what the agents' provider says of all tools when left out."""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """The tool's own settings."""


class FaceEntry(Config):
    """One face: routes over the APIs that this distribution serves."""

    face: Name
    """The name under which an installed plugin declares the face."""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """The face's own settings."""


class MiddlewareEntry(Config):
    """One middleware around every request; the first of the list is the outermost."""

    middleware: Name
    """The name under which an installed plugin declares the middleware."""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """The middleware's own settings."""


class PluginFilter(Config):
    """Which installed plugins may be imported, by the name of an entry point or of a package."""

    allow: tuple[PluginName, ...] | None = None
    """Import these and no others."""
    deny: tuple[PluginName, ...] = ()
    """Import all but these."""

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        if self.allow is not None and self.deny:
            raise ValueError("'allow' and 'deny' are both given; keep one of them")
        return self

    def admits(self, *names: str) -> bool:
        """Whether a plugin known by these names may be imported; ``My_Plugin`` is ``my-plugin``, as pip has it."""
        known = {canonical_name(name) for name in names}
        if self.allow is not None:
            return not known.isdisjoint(map(canonical_name, self.allow))
        return known.isdisjoint(map(canonical_name, self.deny))


class StorageConfig(Config):
    """Where what must outlive the process is kept."""

    url: str = "sqlite"
    """``sqlite`` (a file in the state folder), ``sqlite:///PATH``, ``sqlite::memory:`` or ``postgresql://...``."""

    @field_validator("url")
    @classmethod
    def _known_store(cls, url: str) -> str:
        if not _STORAGE_URL.fullmatch(url):
            raise ValueError(
                "names no store that is known here; "
                "write sqlite, sqlite:///PATH, sqlite::memory: or postgresql://USER@HOST/DATABASE"
            )
        return url


class ServerLimits(Config):
    """What one client may ask of the server before it is refused or cut off."""

    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, le=1024**3)
    """Size of a request body; a larger one is answered 413."""
    max_json_depth: int = Field(default=64, ge=4, le=256)
    """Nesting of a JSON body."""
    max_json_nodes: int = Field(default=100_000, ge=100, le=10_000_000)
    """Values in a JSON body, keys not counted."""
    max_header_bytes: int = Field(default=32 * 1024, ge=1024, le=1024**2)
    """Size of all headers of a request together; larger ones are answered 431."""
    max_connections: int = Field(default=2048, ge=1, le=100_000)
    """Open connections in all."""
    max_connections_per_address: int = Field(default=1024, ge=1, le=100_000)
    """Open connections from one client address."""
    header_timeout_seconds: Seconds = 10.0
    """How long a connection may take to send the headers of a request."""
    body_timeout_seconds: Seconds = 30.0
    """How long a request may take to send its body."""
    write_timeout_seconds: Seconds = 30.0
    """How long a client may take nothing of an answer that waits for it."""
    keep_alive_seconds: Seconds = 15.0
    """How long an idle connection is kept for the next request."""


class ServerConfig(Config):
    """Where the server listens and whom it answers."""

    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    """Address to listen on."""
    port: int = Field(default=8321, ge=0, le=65_535)
    """Port to listen on; 0 takes any free one."""
    allowed_hosts: tuple[Annotated[str, Field(min_length=1, max_length=255)], ...] = ()
    """Names that requests may carry in ``Host`` besides the loopback ones and ``host``; others are answered 421."""
    allowed_origins: tuple[Annotated[str, Field(pattern=ORIGIN_PATTERN, max_length=255)], ...] = ()
    """Origins of other sites whose pages may call this server, such as ``https://chat.example``."""
    strict_requests: bool = False
    """Whether a request that leaves out a field which the draft both requires and gives a default is refused."""
    drain_seconds: Seconds = 30.0
    """How long requests that run at a shutdown may take to finish."""
    limits: ServerLimits = ServerLimits()
    """What one client may ask."""

    @property
    def is_unguarded(self) -> bool:
        """Whether ``host`` is an address that other machines reach, and no name is given under which they may.

        What a host's name stands for is only known when it is looked up, which the start does.
        """
        try:
            return not self.allowed_hosts and not ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False


class Distribution(Config):
    """A distribution: which providers serve which API, and how."""

    version: Literal[1]
    """The version of this file's format."""
    name: Name
    """The name of the distribution, and of its folder under ``LLAMA_STACK_HOME``."""
    extends: str | None = Field(default=None, min_length=1, max_length=4096)
    """A shipped distribution by name, or a file relative to this one, on whose keys these are laid."""
    providers: dict[Name, tuple[ProviderEntry, ...]] = Field(default_factory=dict)
    """The providers of each API."""
    tools: tuple[ToolEntry, ...] = ()
    """Tools that agents may be given."""
    faces: tuple[FaceEntry, ...] = ()
    """Faces over the APIs."""
    middleware: tuple[MiddlewareEntry, ...] = ()
    """Middlewares around every request, the outermost first."""
    plugins: PluginFilter = PluginFilter()
    """Which installed plugins may be imported."""
    requires: tuple[Requirement, ...] = ()
    """Packages that bring what is named here, as pip takes them; ``llama-stack install`` installs what is missing."""
    plugins_dir: str | None = Field(default=None, min_length=1, max_length=4096)
    """A folder of plugins of one file each, relative to this file."""
    storage: StorageConfig = StorageConfig()
    """Where state is kept."""
    server: ServerConfig = ServerConfig()
    """Address, port and limits of the server."""


def canonical_name(name: str) -> str:
    """The one spelling of a package's name (packaging.python.org, name normalization)."""
    return re.sub(r"[-_.]+", "-", name).lower()
