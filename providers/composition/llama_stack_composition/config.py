"""What each of them may be told."""

from __future__ import annotations

from pydantic import Field

from llama_stack.apis import Config, InnerProvider


class FallbackConfig(Config):
    """Providers in the order in which they are tried."""

    providers: tuple[InnerProvider, ...] = Field(min_length=2, max_length=16)
    """The providers; one is asked when those before it cannot serve now."""
    answer_seconds: float | None = Field(default=None, gt=0, le=86_400)
    """How long one may take until its answer begins, before the next is asked; without a limit when left out."""


class CanaryConfig(Config):
    """A provider in use, and one that is to take its place."""

    stable: InnerProvider
    """Gets the requests."""
    canary: InnerProvider
    """Gets a share of them."""
    share: float = Field(ge=0, le=1)
    """How many of the requests the canary gets, from 0 to 1."""
    falls_back: bool = True
    """Whether the stable one is asked where the canary cannot serve."""
    seed: int | None = None
    """Makes the choice repeatable."""


class ShadowConfig(Config):
    """A provider in use, and one that is tried on the same requests."""

    primary: InnerProvider
    """Answers."""
    shadow: InnerProvider
    """Gets the same requests; what it answers is compared and thrown away."""
    share: float = Field(default=1.0, ge=0, le=1)
    """How many of the requests the shadow gets, from 0 to 1."""
    max_pending: int = Field(default=16, ge=1, le=10_000)
    """How many requests it may be behind; those beyond it does not get."""


class CacheConfig(Config):
    """A provider, and which of its answers are kept."""

    provider: InnerProvider
    """Answers what is not kept."""
    operations: tuple[str, ...] = Field(min_length=1)
    """The operations whose answers are kept, such as ``POST /inference/embeddings``."""
    max_entries: int = Field(default=1_000, ge=1, le=1_000_000)
    """How many answers are kept; the one that was asked for longest ago goes first."""
    max_bytes: int = Field(default=64 * 1024 * 1024, ge=1_024)
    """Their size together, as JSON."""
    ttl_seconds: float | None = Field(default=None, gt=0)
    """How long an answer is kept; for ever when left out."""


class RecordConfig(Config):
    """A provider, and the file that its answers are written to."""

    provider: InnerProvider
    """Answers."""
    file: str = Field(min_length=1)
    """The file, one call a line (JSON); what is there is kept. It holds everything that clients say and hear."""


class ReplayConfig(Config):
    """A file that ``record`` wrote."""

    file: str = Field(min_length=1)
    """The file."""
    repeats: bool = True
    """Whether the last answer to a call is given again when the call comes more often than it was recorded."""
