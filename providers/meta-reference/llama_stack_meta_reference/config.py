"""What a distribution says about the models that this plugin serves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator

from llama_stack.apis.common import Id
from llama_stack.apis.config import Config, checked_aliases
from llama_stack.errors import listed, nearest

BUILTIN = "builtin:"
BUILTIN_CHECKPOINTS = ("tiny",)
"""The checkpoints that ship with this package."""


FolderName = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
"""A folder on the server's machine. A relative path starts at its working directory; ``~`` is the home folder."""


class DraftConfig(Config):
    """A small network with the same tokens that guesses ahead for a large one."""

    checkpoint: FolderName
    """A model folder, or ``builtin:tiny``."""
    tokens: int = Field(default=4, ge=1, le=16)
    """How many tokens it guesses at a time, at most."""

    @field_validator("checkpoint")
    @classmethod
    def _check_builtin(cls, value: str) -> str:
        return _checked(value)

    @property
    def folder(self) -> Path:
        """The folder that ``checkpoint`` names."""
        return _folder(self.checkpoint)


class ModelConfig(Config):
    """One checkpoint, where it runs and how many requests it serves at a time."""

    checkpoint: FolderName
    """A model folder of Meta's or Hugging Face's layout, or ``builtin:tiny``. A relative path starts at the working
    directory of the server; ``~`` is the home folder."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,2})$")] = "auto"
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU where there is one, else the CPU. A GPU that is asked for and
    is not there is an error."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "float8"] = "auto"
    """The type of the weights. ``auto`` is bfloat16 on a GPU that has it; on a CPU float32, or for a 16-bit
    checkpoint 16 bits, unless those are slower: the start measures it. ``float8`` is for GPUs of compute capability
    8.9 or more."""
    kernels: Literal["auto", "compiled", "plain"] = "auto"
    """What runs a model on a CPU: kernels compiled on this machine at the first start, or plain torch. ``auto`` takes
    compiled ones where a C++ compiler is installed; ``compiled`` is an error where there is none."""
    context_tokens: int | None = Field(default=None, ge=2)
    """The most tokens that prompt and answer may have together; by default the model's own limit, or as many as the
    cache holds."""
    cache_tokens: int | None = Field(default=None, ge=2)
    """How many tokens all sequences and what is kept for reuse have together; at least one context. By default a whole
    context for each of ``max_sequences``, or what fits the memory beside the weights."""
    max_sequences: int = Field(default=32, ge=1, le=1024)
    """How many sequences are generated at a time, as long as the cache has room for them."""
    queue_size: int = Field(default=256, ge=1, le=100_000)
    """How many requests may wait for a place; one more is refused with 503."""
    prefill_tokens: int = Field(default=512, ge=1, le=65_536)
    """How many tokens one step reads, prompts and running answers together; between two steps every running answer
    gains a token."""
    lookup_tokens: int = Field(default=11, ge=0, le=64)
    """How many next tokens are guessed at most, from what followed the same words before; greedy answers only, which
    stay the same. 0 switches it off."""
    process: Literal["own", "shared"] = "own"
    """Where the model runs: in a process of its ``own``, which the server restarts when it crashes or hangs, or in one
    ``shared`` with the server, for debugging."""
    step_timeout_seconds: float = Field(default=300.0, gt=0, le=86_400)
    """How long a step, or reading an adapter, may take before the model's process counts as hung and is started anew; a
    shared one cannot be ended."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """Into how many processes the network is split, each on a GPU of its own, or all on the CPU; plain kernels and
    weights that are not rounded only."""
    cuda_graphs: bool | Literal["compiled"] = True
    """Whether a GPU runs steps of few tokens as CUDA graphs, which are captured at the start. They take memory beside
    weights and cache, and the time that the log states; ``compiled`` by torch first, they take more of it."""
    prefix_reuse: bool = True
    """Whether a prompt that begins as an earlier one did takes its beginning from the cache."""

    adapters: dict[Id, FolderName] = Field(default_factory=dict)
    """LoRA adapters on this model, each a folder as peft writes it, by the name that requests use."""

    max_adapters: int = Field(default=64, ge=1, le=4096)
    """How many of them there may be at a time, with those that are added by request; each takes memory."""
    draft: DraftConfig | None = None
    """A small network that guesses ahead, where answers are greedy; they stay the same."""

    @field_validator("checkpoint")
    @classmethod
    def _check_builtin(cls, value: str) -> str:
        return _checked(value)

    @field_validator("max_adapters")
    @classmethod
    def _check_adapters(cls, most: int, info: ValidationInfo) -> int:
        named = len(info.data.get("adapters", ()))
        if named > most:
            raise ValueError(f"{named} adapters are named; set at least {named}")
        return most

    @field_validator("draft")
    @classmethod
    def _check_draft(cls, draft: DraftConfig | None, info: ValidationInfo) -> DraftConfig | None:
        if draft is not None and info.data.get("tensor_parallel", 1) > 1:
            raise ValueError("a draft network beside a network that is split is not supported; set tensor_parallel: 1")
        return draft

    @field_validator("tensor_parallel")
    @classmethod
    def _check_ranks(cls, ranks: int, info: ValidationInfo) -> int:
        if ranks > 1 and info.data.get("process") == "shared":
            raise ValueError(f"{ranks} ranks cannot share one process; set process: own")
        if ranks > 1 and re.fullmatch("cuda:.*", info.data.get("device", "")):
            raise ValueError(f"{ranks} ranks take as many GPUs, from the first on; set device: cuda")
        return ranks

    @field_validator("cuda_graphs")
    @classmethod
    def _check_graphs(cls, graphs: bool | str, info: ValidationInfo) -> bool | str:
        if graphs == "compiled" and info.data.get("tensor_parallel", 1) > 1:
            raise ValueError("the steps of a network that is split are not compiled; set true, or tensor_parallel: 1")
        return graphs

    @field_validator("cache_tokens")
    @classmethod
    def _check_cache(cls, cache_tokens: int | None, info: ValidationInfo) -> int | None:
        context_tokens = info.data.get("context_tokens")
        if cache_tokens is not None and context_tokens is not None and cache_tokens < context_tokens:
            raise ValueError(
                f"a cache of {cache_tokens} tokens does not hold one context of {context_tokens}; "
                f"set at least {context_tokens}, or less context_tokens"
            )
        return cache_tokens

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """The absolute paths that ``adapters`` names."""
        return {name: Path(folder).expanduser().absolute() for name, folder in self.adapters.items()}

    @property
    def folder(self) -> Path:
        """The folder that ``checkpoint`` names."""
        return _folder(self.checkpoint)


def _checked(checkpoint: str) -> str:
    name = checkpoint.removeprefix(BUILTIN)
    if checkpoint.startswith(BUILTIN) and name not in BUILTIN_CHECKPOINTS:
        raise ValueError(
            f"no checkpoint {name!r} ships with this package; "
            f"shipped: {listed(BUILTIN_CHECKPOINTS)}{nearest(name, BUILTIN_CHECKPOINTS)}"
        )
    return checkpoint


def _folder(checkpoint: str) -> Path:
    if checkpoint.startswith(BUILTIN):
        return Path(__file__).parent / "checkpoints" / checkpoint.removeprefix(BUILTIN)
    return Path(checkpoint).expanduser()


class RewardModelConfig(Config):
    """One reward model and where it runs."""

    checkpoint: FolderName
    """A folder as kind ``reward`` of the trainer leaves it: Hugging Face's layout of a
    ``LlamaForSequenceClassification`` with one label."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,2})$")] = "auto"
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU where there is one, else the CPU."""
    portion_tokens: int = Field(default=4096, ge=1, le=1_048_576)
    """About how many tokens go through the network at once."""

    @property
    def folder(self) -> Path:
        """The folder that ``checkpoint`` names."""
        return _folder(self.checkpoint)


class RewardConfig(Config):
    """The reward models that this provider serves, and other names for them."""

    models: dict[Id, RewardModelConfig] = Field(min_length=1)
    """Each model by the name that requests use."""
    aliases: dict[Id, Id] = Field(default_factory=dict)
    """Further names, each for one of the models, such as the draft's ``llama3_405b_reward``."""

    @field_validator("aliases")
    @classmethod
    def _check_aliases(cls, aliases: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        return checked_aliases(cls.__name__, aliases, info.data.get("models"))


class MetaReferenceConfig(Config):
    """The models that this provider serves, and other names for them."""

    models: dict[Id, ModelConfig] = Field(min_length=1)
    """Each model by the name that requests use."""
    aliases: dict[Id, Id] = Field(default_factory=dict)
    """Further names, each for one of the models, such as the draft's ``llama3_8b_chat``."""
    adapters_folder: FolderName | None = None
    """Where the folders lie that ``POST /inference/adapters/add`` may name; without it none may be added or removed by
    request."""

    @property
    def adapters_root(self) -> Path | None:
        """The absolute path that ``adapters_folder`` names."""
        return Path(self.adapters_folder).expanduser().absolute() if self.adapters_folder else None

    @field_validator("models")
    @classmethod
    def _check_adapters(cls, models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        taken = dict.fromkeys(models, "a model")
        for model in models.values():
            for name in model.adapters:
                if name in taken:
                    raise ValueError(f"the adapter {name!r} has the name of {taken[name]}; rename one of them")
                taken[name] = "another adapter"
        return models

    @field_validator("aliases")
    @classmethod
    def _check_aliases(cls, aliases: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        models = info.data.get("models")
        adapters = [name for config in (models or {}).values() for name in config.adapters]
        return checked_aliases(cls.__name__, aliases, models and {*models, *adapters})
