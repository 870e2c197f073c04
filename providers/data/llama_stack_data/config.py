"""What a distribution may say of datasets, rewards and synthetic data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from llama_stack.apis import Config
from llama_stack.apis.common import MAX_TOKENS, Id
from llama_stack.apis.config import checked_aliases
from llama_stack.fetch import FetchConfig


class RowLimits(Config):
    """What reading a dataset may cost. Its size is no cost: rows are read one after the other."""

    row_bytes: int = Field(default=8 * 1024 * 1024, ge=1, le=64 * 1024 * 1024)
    """The largest row, as JSON, or as the file writes it."""
    seconds: float = Field(default=60.0, gt=0, le=3600)
    """How long it may take until the next row comes."""
    memory_bytes: int = Field(default=1024**3, ge=256 * 1024 * 1024)
    """The most memory of the process that reads a file."""
    ratio: float = Field(default=200.0, gt=0)
    """How many times its size a Parquet file may unpack to, where that is more than 64 MiB."""
    readers: int = Field(default=8, ge=1, le=1000)
    """How many datasets may be read at a time; a further one waits."""


class DatasetsConfig(Config):
    """Where datasets may be, and what reading them may cost."""

    fetch: FetchConfig = FetchConfig(max_bytes=4 * 1024**3, timeout_seconds=600)
    """What of the URLs of datasets may be read. Where nothing is said `hosts` and `file_roots` are empty, as
    everywhere, `max_bytes` is 4 GiB and `timeout_seconds` 600.
    """
    rows: RowLimits = RowLimits()
    """What reading them may cost."""
    spool_folder: Path | None = None
    """Where downloads lie while they are read; the system's folder for temporary files where nothing is said."""

    @field_validator("fetch", mode="before")
    @classmethod
    def _with_our_defaults(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {"max_bytes": 4 * 1024**3, "timeout_seconds": 600, **value}
        return value


Weight = Annotated[float, Field(ge=-1_000_000, le=1_000_000)]


class _Rule(Config):
    weight: Weight = 1.0
    """What the rule's value, from 0 to 1, is multiplied with; a negative weight makes it a penalty."""


class LengthRule(_Rule):
    """1 within the range; outside it falls in proportion to how far."""

    rule: Literal["length"]
    of: Literal["characters", "words"] = "words"
    """What is counted."""
    at_least: int = Field(default=1, ge=0)
    """The least that is right."""
    at_most: int = Field(default=1_000_000, ge=1)
    """The most that is right."""

    @model_validator(mode="after")
    def _is_a_range(self) -> LengthRule:
        if self.at_least > self.at_most:
            raise ValueError("at_least is more than at_most; swap them")
        return self


class RegexRule(_Rule):
    """1 where the pattern is found, else 0. Patterns are RE2's: linear in time, without look-around and references."""

    rule: Literal["regex"]
    pattern: Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
    """What is searched for, anywhere in the answer; `(?i)` at its beginning ignores case."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        import re2  # with the first pattern: listing what is installed needs none

        options = re2.Options()
        options.log_errors = False
        try:
            re2.compile(value, options)
        except re2.error as error:
            said = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            raise ValueError(f"not a pattern of RE2: {said}; see github.com/google/re2/wiki/Syntax") from None
        return value


class ContainsRule(_Rule):
    """How many of the texts the answer holds, each in full."""

    rule: Literal["contains"]
    texts: Annotated[tuple[Annotated[str, StringConstraints(min_length=1)], ...], Field(min_length=1, max_length=1000)]
    """What is looked for."""
    count: Literal["all", "any", "none"] = "all"
    """`all`: the share of them that is there; `any`: 1 where one is; `none`: 1 where none is."""
    ignore_case: bool = True
    """Whether upper and lower case are the same."""


class JsonRule(_Rule):
    """1 where the whole answer is JSON, else 0."""

    rule: Literal["json"]
    keys: tuple[str, ...] = ()
    """Where there are any, the answer must be an object that has at least these."""


class RepetitionRule(_Rule):
    """The share of different runs of words among all: 1 where nothing is said twice."""

    rule: Literal["repetition"]
    words: int = Field(default=3, ge=1, le=100)
    """How many words a run has."""


class EndingRule(_Rule):
    """1 where the answer ends as a text ends: with a mark that ends a sentence, every block of code closed; else 0."""

    rule: Literal["ending"]


Rule = Annotated[
    LengthRule | RegexRule | ContainsRule | JsonRule | RepetitionRule | EndingRule, Field(discriminator="rule")
]


class RulesModel(Config):
    """A reward made of rules: the sum of their weighted values."""

    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=1000)]
    """The rules."""


class RulesConfig(Config):
    """Reward models that are made of rules."""

    models: Annotated[dict[Id, RulesModel], Field(min_length=1)]
    """Each by its name."""
    aliases: dict[Id, Id] = Field(default_factory=dict)
    """Further names, each for one of the models, such as the draft's ``llama3_405b_reward``."""

    @field_validator("aliases")
    @classmethod
    def _are_of_models(cls, aliases: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        return checked_aliases(cls.__name__, aliases, info.data.get("models"))


class JudgeModel(Config):
    """A chat model that is asked for a score."""

    judge: Id
    """The chat model, by the name under which the distribution serves it."""
    criteria: str = "How good the answer is: correct, to the point, complete, and no longer than it must be."
    """What the score is for, in words for the judge."""
    lowest: int = Field(default=0, ge=-1000, le=1000)
    """The score of the worst answer."""
    highest: int = Field(default=10, ge=-1000, le=1000)
    """The score of the best answer."""
    attempts: int = Field(default=3, ge=1, le=10)
    """How often it is asked until it gives a score in the form that it was told; after that scoring fails."""
    max_tokens: int = Field(default=512, ge=1, le=MAX_TOKENS)
    """The most tokens that it may write, its reasons among them."""

    @model_validator(mode="after")
    def _is_a_range(self) -> JudgeModel:
        if self.lowest >= self.highest:
            raise ValueError("lowest is not below highest; swap them, or set them apart")
        return self


class JudgeConfig(Config):
    """Reward models that are chat models asked for a score."""

    models: Annotated[dict[Id, JudgeModel], Field(min_length=1)]
    """Each by its name."""
    aliases: dict[Id, Id] = Field(default_factory=dict)
    """Further names, each for one of the models, such as the draft's ``llama3_405b_reward``."""
    concurrency: int = Field(default=8, ge=1, le=1000)
    """How many answers are judged at a time."""

    @field_validator("aliases")
    @classmethod
    def _are_of_models(cls, aliases: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        return checked_aliases(cls.__name__, aliases, info.data.get("models"))


class SyntheticDataConfig(Config):
    """What is done where a request does not say."""

    generator: Id
    """The chat model that writes the answers."""
    model: Id
    """The reward model that scores them."""
    n_samples: int = Field(default=4, ge=1, le=1024)
    """How many answers are sampled for each prompt."""
    k: int = Field(default=1, ge=1, le=1024)
    """How many answers `top_k` keeps."""
    p: float = Field(default=0.5, gt=0, le=1)
    """How much of the softmax mass `top_p` keeps."""
    threshold: float | None = None
    """The least score of an answer that any filter keeps."""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """The temperature of sampling; 0 makes all answers to a prompt the same."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """From how much of the probability tokens are sampled."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """What sampling and the filters draw from."""
    max_tokens: int = Field(default=512, ge=1, le=MAX_TOKENS)
    """The most tokens of an answer."""
    max_samples: int = Field(default=10_000, ge=1, le=1_000_000)
    """How many answers a request may ask for: prompts times samples."""
    concurrency: int = Field(default=16, ge=1, le=1000)
    """How many answers are sampled at a time."""
