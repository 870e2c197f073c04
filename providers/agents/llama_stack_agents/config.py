"""What an operator says of all agents."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from llama_stack.apis import Config
from llama_stack.fetch import FetchConfig


class HistoryPolicy(StrEnum):
    """What happens when a talk no longer fits the model's context."""

    REFUSE = "refuse"
    """The request is refused with 422 ``context_length_exceeded``."""
    DROP_OLDEST = "drop_oldest"
    """The oldest turns are left out, and a step of the turn says how many."""


class Limits(Config):
    """What a turn may take before it is ended; its last step says by which limit."""

    steps: int = Field(default=10, ge=1, le=1000)
    """How often the model is asked."""
    seconds: float = Field(default=300.0, gt=0, le=86_400)
    """How long the turn may take."""
    tokens: int = Field(default=4096, ge=1)
    """How many tokens the model may write, over all its answers.

    A streamed piece of text counts as one, a call as one for each four characters of its arguments.
    """
    repeats: int = Field(default=3, ge=1)
    """How often the same call, by name and arguments, may be made."""
    calls: int = Field(default=32, ge=1, le=1000)
    """How many calls one answer of the model may ask for."""


class Retrieval(Config):
    """What is retrieved from an agent's banks when a user says something."""

    documents: int = Field(default=5, ge=1, le=100)
    """The most pieces that a turn is given, the best of all banks."""
    max_characters: int = Field(default=8000, ge=1)
    """The most characters that they may have together; a piece that does not fit is left out whole."""
    min_score: float | None = None
    """The least score of a piece; scores mean what the bank's provider says they mean."""


class AgentsConfig(Config):
    """How agents work."""

    limits: Limits = Limits()
    """What a turn may take."""
    history: HistoryPolicy = HistoryPolicy.REFUSE
    """What happens when a talk no longer fits the model's context."""
    retrieval: Retrieval = Retrieval()
    """What is retrieved from banks."""
    window_characters: int = Field(default=200, ge=1)
    """How much streamed text waits for a judgement, where there are output shields; a plain reply is judged whole."""
    shield_timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    """How long a shield may take; after that it has objected."""
    tool_timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    """How long a call of a tool may take; after that the model reads that it took too long."""
    max_tool_characters: int = Field(default=20_000, ge=1)
    """The longest answer of a tool that a model is given; of a longer one it reads how long it was."""
    max_attachment_characters: int = Field(default=8_000_000, ge=1)
    """The longest URLs, ``data:`` ones with what they hold, that an answer of a tool may attach, all together."""
    max_tool_attachment_characters: int = Field(default=16 * 1024 * 1024, ge=0)
    """How much all tools of a turn may attach together, as URLs; an answer beyond it is refused, and the model told."""
    max_attached_bytes: int = Field(default=16 * 1024 * 1024, ge=0)
    """How long the texts that a client attaches may be together, those of earlier turns among them."""
    fetch: FetchConfig = FetchConfig()
    """What of the URLs of attachments may be read."""
