"""What a training job is told and what it tells: ``plan.json``, ``progress.jsonl`` and the layout of a job's folder.

Whoever starts a job writes the folder and the plan, runs ``python -m llama_stack_meta_reference.training JOB_FOLDER``
(under torchrun for several ranks) and reads what is appended to the progress file. No torch is imported here.

    JOB_FOLDER/
      plan.json                   a ``TrainingPlan``
      train.jsonl                 rows, where the plan says they are; validation.jsonl beside it
      progress.jsonl              one ``Event`` a line, appended
      reference.safetensors       DPO: the log-probabilities of the rows by the weights that training began with
      checkpoints/
        iters-00000100/           weights, ``trainer/`` (what a resumption needs) and, last, manifest.json
      trials/000/                 a search: a job folder for each trial
      tensorboard/                where the plan asks for it
      result/                     the weights and manifest.json

A row is ``{"dialog": [Message, ...]}`` or ``{"text": "..."}`` for kind ``sft`` and ``{"prompt": [Message, ...],
"chosen": [...], "rejected": [...]}`` for ``dpo`` and ``reward``, with ``Message`` of ``llama_stack.apis.common``.

The weights of a checkpoint and of the result are in Hugging Face's layout (``config.json``, ``model.safetensors``,
``generation_config.json``, the tokenizer's file), in peft's (``adapter_config.json``, ``adapter_model.safetensors``)
where an adapter was trained and ``AdapterSettings.is_merged`` is false, or, for kind ``reward``, in that of a
``LlamaForSequenceClassification`` with one label.

The process ends with 0 when the job is finished or was stopped by SIGTERM (the last event says which), with 1 when it
failed (the event says why), and with 3 when another process works in the folder, which it leaves as it is. Started
again on a folder it goes on from the newest valid checkpoint; on one with a result it says ``finished`` again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError, model_validator

from llama_stack.apis import Config

PLAN_FILE = "plan.json"
PROGRESS_FILE = "progress.jsonl"
LOCK_FILE = "lock"
"""Locked (flock) by the process that works in the folder, for as long as it lives."""
REFERENCE_FILE = "reference.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"
TRIALS_FOLDER = "trials"
TENSORBOARD_FOLDER = "tensorboard"
RESULT_FOLDER = "result"
STATE_FOLDER = "trainer"
"""Inside a checkpoint: what only a resumption reads."""
MANIFEST_FILE = "manifest.json"

EXIT_DONE, EXIT_FAILED, EXIT_BUSY = 0, 1, 3

ATTENTION_MODULES: Mapping[str, str] = {
    "wq": "wq", "q_proj": "wq",
    "wk": "wk", "k_proj": "wk",
    "wv": "wv", "v_proj": "wv",
    "wo": "wo", "o_proj": "wo", "output_proj": "wo",
}  # fmt: skip
"""What ``lora_attn_modules`` may name: Meta's, Hugging Face's and torchtune's names of the same four matrices."""

_WEBHOOK = re.compile(r"https?://(?P<host>[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?([/?][!-~]*)?")
"""No more than what every parser reads the same way."""


def checkpoint_name(iters: int) -> str:
    """The name of the folder of the checkpoint after ``iters`` iterations."""
    return f"iters-{iters:08}"


class AdapterSettings(Config):
    """Which matrices get an adapter and how large it is (Hu et al. 2021, arXiv:2106.09685)."""

    attention: tuple[Literal["wq", "wk", "wv", "wo"], ...] = ("wq", "wk", "wv", "wo")
    """Matrices of attention, by model.py's names; ``ATTENTION_MODULES`` has the others'."""
    is_on_mlp: bool = True
    """Whether the three matrices of each feed-forward layer get one."""
    is_on_output: bool = False
    """Whether the output matrix gets one; refused for a model whose output is its embedding table."""
    rank: int = Field(default=8, ge=1, le=512)
    alpha: float = Field(default=16.0, gt=0, le=1_000_000)
    """What the adapter adds is multiplied by alpha / rank."""
    is_merged: bool = False
    """Whether checkpoints and the result are whole models with the adapter worked in, in the place of the adapter.

    The engine serves adapters of ``lora`` and ``qlora`` without ``is_on_output`` as they are; others have to be merged.
    A reward model is always a whole model.
    """

    @model_validator(mode="after")
    def _adapts_something(self) -> Self:
        if not (self.attention or self.is_on_mlp or self.is_on_output):
            raise ValueError("the adapter adds to no matrix; name attention modules, or the MLP or the output")
        if len(set(self.attention)) != len(self.attention):
            raise ValueError("attention: a matrix is named twice")
        return self


class OptimizerSettings(Config):
    """The optimiser, and a learning rate that warms up and then falls along a cosine from ``lr`` to ``lr_min``."""

    kind: Literal["adam", "adamw", "sgd"] = "adamw"
    """``adam`` adds the decay to the gradient, ``adamw`` shrinks the weights by it (arXiv:1711.05101); ``sgd`` has no
    momentum."""
    lr: float = Field(default=1e-4, ge=0, le=100)
    lr_min: float = Field(default=0.0, ge=0, le=100)
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """Of matrices; norms and magnitudes do not decay."""
    warmup_iters: int | None = Field(default=None, ge=0)
    """Iterations in which the rate climbs to ``lr``; None: 3 in 100 of all."""
    clip_norm: float = Field(default=1.0, ge=0)
    """The longest that a gradient over all weights may be; 0 = any length."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min {self.lr_min:g} is above lr {self.lr:g}; it is where the rate falls to")
        return self


class TrainingSettings(Config):
    """How long and in what portions."""

    n_epochs: int = Field(default=1, ge=0)
    """Passes over the rows; 0 = no limit. The first limit that is reached ends the training."""
    n_iters: int = Field(default=0, ge=0)
    """Iterations, each an update of the weights; 0 = no limit."""
    batch_size: int = Field(default=8, ge=1)
    """Rows an iteration, over all ranks; an epoch's last has what is left."""
    is_shuffled: bool = True
    """Whether each epoch has an order of its own, which the seed settles."""
    max_tokens: int | None = Field(default=None, ge=8)
    """The longest sequence, over which a row is cut at its end; None: the model's context."""
    micro_tokens: int = Field(default=4096, ge=1)
    """About how many tokens go through the network at once; their gradients are added up over an iteration's batch."""
    is_checkpointing_activations: bool = False
    """Whether activations of a layer are computed again for the gradient, which saves memory for a third more time."""
    is_wrapped_fsdp: bool = False
    """Of several ranks: whether the tables of embeddings and output are sharded units of their own."""
    is_offloaded_fsdp: bool = False
    """Of several ranks on GPUs: whether weights, gradients and optimiser state stay in the host's memory."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What products are computed in. ``auto``: bfloat16 where the device has units for it.

    What is trained is kept in float32 either way, and what is frozen as the base stores it.
    """

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if not (self.n_epochs or self.n_iters):
            raise ValueError("n_epochs and n_iters are both 0, which is no limit; give one of them")
        return self


class PreferenceSettings(Config):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), as the draft's four numbers have it."""

    reward_scale: float = Field(default=0.1, gt=0)
    """beta."""
    reward_clip: float = Field(default=0.0, ge=0)
    """The largest size of an implicit reward; 0 = any."""
    epsilon: float = Field(default=0.0, ge=0, lt=0.5)
    """Label smoothing: the share of pairs that are taken to be the wrong way round."""
    gamma: float = 0.0
    """By how much the chosen reward should exceed the rejected one."""


class SearchSettings(Config):
    """A search for settings: each trial is a training of its own, and the one of the least validation loss is kept."""

    method: Literal["grid", "random"] = "grid"
    """All combinations of the values in order, or ``trials`` different ones of them, drawn by the seed."""
    trials: int = Field(default=8, ge=1, le=256)
    """How many at most."""
    lr: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(default=(), max_length=32)
    """``lr_min`` goes along, as the share of it that it is in the plan."""
    rank: tuple[Annotated[int, Field(ge=1, le=512)], ...] = Field(default=(), max_length=32)
    alpha: tuple[Annotated[float, Field(gt=0, le=1_000_000)], ...] = Field(default=(), max_length=32)
    batch_size: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), max_length=32)

    @model_validator(mode="after")
    def _varies(self) -> Self:
        if not (self.lr or self.rank or self.alpha or self.batch_size):
            raise ValueError("the search varies nothing; give values of lr, rank, alpha or batch_size")
        return self


class LoggerSettings(Config):
    """Where progress goes besides ``progress.jsonl``."""

    is_tensorboard: bool = False
    """Whether event files are written for TensorBoard, whose package must be installed then."""
    webhook_url: str | None = None
    """Where each event but ``step`` is sent by POST as JSON. A webhook that fails is given up on, not the training."""
    webhook_hosts: tuple[str, ...] = ()
    """The hosts that the distribution allows to be reached so, in lower case; the webhook's must be one of them."""

    @model_validator(mode="after")
    def _is_allowed(self) -> Self:
        if self.webhook_url is None:
            return self
        match = _WEBHOOK.fullmatch(self.webhook_url)
        if match is None:
            raise ValueError("the webhook must be an http or https URL without user information")
        if match["host"].lower() not in self.webhook_hosts:
            raise ValueError(
                f"the webhook's host {match['host']!r} is not allowed here; allowed: "
                f"{', '.join(self.webhook_hosts) or 'none'}"
            )
        return self


class TrainingPlan(Config):
    """All that a job is told. A path may be relative to the job's folder."""

    kind: Literal["sft", "dpo", "reward"]
    base: Path
    """The folder of the model that training begins with, in a layout that inference reads."""
    adapter: Path | None = None
    """An adapter of that model, in peft's layout, which training goes on with.

    Rank, alpha and matrices are then the adapter's, whatever ``adapter_settings`` says of them.
    """
    algorithm: Literal["full", "lora", "qlora", "dora"] = "lora"
    adapter_settings: AdapterSettings = AdapterSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    preferences: PreferenceSettings = PreferenceSettings()
    """Of kind ``dpo``."""
    train: Path = Path("train.jsonl")
    validation: Path | None = None
    """None, or a file without rows: there is no validation loss."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:N`` or ``auto``: a GPU where there is one.

    Under torchrun each rank takes a GPU of its own.
    """
    save_every: int = Field(default=100, ge=0)
    """Iterations from one checkpoint to the next; the last iteration always gets one. 0 = only the last."""
    keep_checkpoints: int = Field(default=3, ge=0)
    """How many of the newest checkpoints stay; 0 = all."""
    validate_every: int = Field(default=100, ge=0)
    """Iterations from one validation to the next; the last iteration always gets one. 0 = only the last."""
    search: SearchSettings | None = None
    loggers: LoggerSettings = LoggerSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.adapter is not None and self.algorithm == "full":
            raise ValueError("algorithm full trains no adapter, and one is given; merge it into the base first")
        if self.kind == "reward" and self.adapter_settings.is_on_output and self.algorithm != "full":
            raise ValueError("a reward model has no output matrix that an adapter could add to")
        if self.search is not None and self.validation is None:
            raise ValueError("a search compares validation losses, and there are no validation rows")
        if self.search is not None and (self.search.rank or self.search.alpha) and self.algorithm == "full":
            raise ValueError("a search over rank or alpha needs an adapter, and algorithm full has none")
        if self.search is not None and (self.search.rank or self.search.alpha) and self.adapter is not None:
            raise ValueError(
                "rank and alpha are those of the adapter that training goes on with; a search cannot vary them"
            )
        return self

    @classmethod
    def load(cls, job: Path) -> TrainingPlan:
        """The plan in a job's folder, its paths absolute. Raises ``ValueError`` and ``OSError``."""
        plan = cls.model_validate_json((job / PLAN_FILE).read_bytes())
        paths = {name: getattr(plan, name) for name in ("base", "adapter", "train", "validation")}
        return plan.model_copy(update={name: job / path for name, path in paths.items() if path is not None})

    def save(self, job: Path) -> None:
        """Write the plan into a job's folder."""
        (job / PLAN_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class _Event(Config):
    time: AwareDatetime


class Started(_Event):
    """Training begins, or goes on after ``iters`` iterations."""

    event: Literal["started"] = "started"
    iters: int
    total_iters: int
    device: str
    """Such as ``cpu``, or ``cuda:0 (NVIDIA H100)``."""
    precision: str
    world_size: int
    trainable_parameters: int
    parameters: int
    rows: int
    resumed_from: str | None = None
    """The name of the checkpoint that training goes on from."""


class Shown(_Event):
    """One row as the network sees it: pieces of text, and for each whether the model learns to write it."""

    event: Literal["sample"] = "sample"
    pieces: list[tuple[str, bool]]


class Step(_Event):
    """An iteration is done."""

    event: Literal["step"] = "step"
    iters: int
    loss: float
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens_per_second: float
    seconds_left: float
    accuracy: float | None = None
    """Preferences: the share of pairs whose chosen answer has the higher reward."""


class Validation(_Event):
    """The loss over the validation rows."""

    event: Literal["validation"] = "validation"
    iters: int
    loss: float
    accuracy: float | None = None


class CheckpointSaved(_Event):
    """A checkpoint has its name: from now on it is there after any crash."""

    event: Literal["checkpoint"] = "checkpoint"
    iters: int
    folder: str
    """Relative to the job's folder."""


class Trial(_Event):
    """A trial of the search has ended."""

    event: Literal["trial"] = "trial"
    number: int
    trials: int
    settings: dict[str, float]
    validation_loss: float | None = None
    """None: the training came apart."""


class Note(_Event):
    """What somebody who reads the log should know, such as a checkpoint that was passed over."""

    event: Literal["note"] = "note"
    text: str


class Finished(_Event):
    """The result is there."""

    event: Literal["finished"] = "finished"
    iters: int
    folder: str


class Stopped(_Event):
    """SIGTERM came: what was done is in the newest checkpoint, and the process ends with 0."""

    event: Literal["stopped"] = "stopped"
    iters: int


class Failed(_Event):
    """The job cannot go on; to start it again would fail again."""

    event: Literal["failed"] = "failed"
    reason: str
    code: str
    """The error's ``code`` in ``llama_stack.errors``, or ``internal_error``."""


Event = Annotated[
    Started | Shown | Step | Validation | CheckpointSaved | Trial | Note | Finished | Stopped | Failed,
    Field(discriminator="event"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def parse_event(line: str | bytes) -> Event:
    """One line of ``progress.jsonl``. Raises ``ValueError``."""
    return _EVENT.validate_json(line)


def read_progress(job: Path) -> Iterator[Event]:
    """The events of a job so far, oldest first. A line that a crash cut off is passed over."""
    try:
        lines = (job / PROGRESS_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield parse_event(line)
        except ValidationError:
            continue
