"""What a distribution says about training jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from llama_stack.apis.common import Id
from llama_stack.apis.config import Config

from ..config import FolderName

Host = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_][a-z0-9_.-]*$", max_length=255)]


class PostTrainingConfig(Config):
    """What may be trained, how many jobs run at a time, and how they save."""

    models: dict[Id, FolderName] = Field(default_factory=dict)
    """Model folders that may be trained beside those that this stack serves; what is made of them is not served."""
    checkpoint_roots: tuple[Path, ...] = ()
    """Absolute folders below which ``finetuned_model`` may name a checkpoint; what jobs have made it always may."""
    max_running: int = Field(default=1, ge=1, le=64)
    """How many jobs run at a time; the others wait in the order in which they came."""
    queue_size: int = Field(default=1000, ge=1, le=100_000)
    """How many jobs may wait; one more is refused with 503."""
    max_attempts: int = Field(default=5, ge=1, le=1000)
    """How often a job is started without a new checkpoint before it counts as failed."""
    processes: int = Field(default=1, ge=1, le=64)
    """Into how many processes the training of one job is split, each on a GPU of its own, or all on the CPU."""
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda|cuda:[0-9]{1,2})$")] = "auto"
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU where there is one, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What products are computed in. ``auto`` is bfloat16 where the device has units for it."""
    save_every: int = Field(default=100, ge=1)
    """How many iterations pass between two checkpoints: what a crash can cost."""
    keep_checkpoints: int = Field(default=3, ge=1, le=1000)
    """How many of a job's checkpoints stay, the newest; the result stays beside them."""
    validate_every: int = Field(default=100, ge=1)
    """How many iterations pass between two looks at the validation rows."""
    max_tokens: int | None = Field(default=None, ge=8)
    """The longest sequence that is trained on, over which a row is cut; by default the model's context."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Settles the order of rows and every other chance."""
    served_models: int = Field(default=4, ge=0, le=1000)
    """How many jobs with whole weights are served at a time, the newest; each takes the memory of a model."""
    webhook_hosts: tuple[Host, ...] = ()
    """Hosts that ``logger_config`` may have events sent to."""
