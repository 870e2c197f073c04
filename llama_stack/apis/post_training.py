"""The PostTraining API: fine-tune and align models in jobs that outlive the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import AwareDatetime, Discriminator, Field, Tag

from .common import ANY_OF, EXTENSION, URL, BaseModelName, Choice, Id, Items, JsonObject, Maybe, Schema, draft
from .contract import Api, get, post
from .datasets import Dataset


class FinetuningAlgorithm(Choice):
    """How supervised fine-tuning changes the weights."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    DORA = "dora"


class AlignmentAlgorithm(Choice):
    """How preferences are learned."""

    DPO = "dpo"


class OptimizerType(Choice):
    """The optimiser."""

    ADAM = "adam"
    ADAMW = "adamw"
    SGD = "sgd"


class LoraFinetuningConfig(Schema):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    lora_attn_modules: Items[Id]
    apply_lora_to_mlp: bool
    apply_lora_to_output: bool
    rank: Annotated[int, Field(ge=1, le=65_536)]
    alpha: Annotated[int, Field(ge=1, le=1_000_000)]


class QLoraFinetuningConfig(LoraFinetuningConfig):
    """Adapters on a 4-bit base (Dettmers et al. 2023, arXiv:2305.14314)."""


class DoraFinetuningConfig(LoraFinetuningConfig):
    """Weight-decomposed adapters (Liu et al. 2024, arXiv:2402.09353)."""


def _adapter_tag(config: Any) -> str:
    """What the caller built; LoRA for JSON, where the three have the same keys and ``algorithm`` tells them apart."""
    return type(config).__name__ if isinstance(config, LoraFinetuningConfig) else LoraFinetuningConfig.__name__


AdapterConfig = Annotated[
    Annotated[LoraFinetuningConfig, Tag("LoraFinetuningConfig")]
    | Annotated[QLoraFinetuningConfig, Tag("QLoraFinetuningConfig")]
    | Annotated[DoraFinetuningConfig, Tag("DoraFinetuningConfig")],
    Discriminator(_adapter_tag),
    ANY_OF,
]
"""The settings of an adapter, of any of the three kinds."""


class DPOAlignmentConfig(Schema):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

    ``reward_scale`` is beta, ``reward_clip`` clips the implicit reward (0 = off), ``epsilon`` is label smoothing,
    ``gamma`` a reward margin (spec: settled readings, operation 19).
    """

    reward_scale: Annotated[float, Field(gt=0)]
    reward_clip: Annotated[float, Field(ge=0)]
    epsilon: Annotated[float, Field(ge=0, lt=0.5)]
    gamma: float


class OptimizerConfig(Schema):
    """The optimiser and its schedule: from ``lr`` down to ``lr_min``."""

    optimizer_type: OptimizerType
    lr: Annotated[float, Field(ge=0)]
    lr_min: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]


class TrainingConfig(Schema):
    """How long and in what portions to train; the first limit reached ends it, 0 = no limit."""

    n_epochs: Annotated[int, Field(ge=0, le=1_000_000)]
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)]
    shuffle: bool
    n_iters: Annotated[int, Field(ge=0, le=1_000_000_000)]
    enable_activation_checkpointing: bool
    memory_efficient_fsdp_wrap: bool
    fsdp_cpu_offload: bool


class PostTrainingSFTRequest(Schema, title="Request to finetune a model."):
    """Fine-tune a model on dialogs or texts. ``algorithm`` says how the adapter settings are meant (spec rule G4)."""

    job_uuid: Id
    model: BaseModelName
    dataset: Dataset
    validation_dataset: Dataset
    algorithm: FinetuningAlgorithm
    algorithm_config: Annotated[Maybe[AdapterConfig], draft(required=True)] = None
    optimizer_config: OptimizerConfig
    training_config: TrainingConfig
    hyperparam_search_config: JsonObject
    logger_config: JsonObject


class PostTrainingRLHFRequest(Schema, title="Request to align a finetuned model."):
    """Align a fine-tuned model with preferences."""

    job_uuid: Id
    finetuned_model: URL
    dataset: Dataset
    validation_dataset: Dataset
    algorithm: AlignmentAlgorithm
    algorithm_config: DPOAlignmentConfig
    optimizer_config: OptimizerConfig
    training_config: TrainingConfig
    hyperparam_search_config: JsonObject
    logger_config: JsonObject


class JobStatus(Choice):
    """Where a job stands."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    SCHEDULED = "scheduled"


class Checkpoint(Schema):
    """Weights that a job saved, and after how many iterations."""

    inline = True

    iters: int
    path: URL


class PostTrainingJobStatusResponse(Schema, title="Status of a finetuning job."):
    """A job's state; the times are there once they have come."""

    job_uuid: Id
    status: JobStatus
    scheduled_at: Maybe[AwareDatetime] = None
    started_at: Maybe[AwareDatetime] = None
    completed_at: Maybe[AwareDatetime] = None
    resources_allocated: Maybe[JsonObject] = None
    checkpoints: Items[Checkpoint]


class PostTrainingJobLogStream(Schema, title="Stream of logs from a finetuning job."):
    """Lines of a job's log, oldest first."""

    job_uuid: Id
    log_lines: list[str]


class PostTrainingJobArtifactsResponse(Schema, title="Artifacts of a finetuning job."):
    """What a job has saved so far."""

    job_uuid: Id
    checkpoints: Items[Checkpoint]


class JobSummary(Schema):
    """A job and where it stands."""

    job_uuid: Id
    status: JobStatus


class PostTraining(Api, name="post_training", routed_by="job_uuid"):
    """Training jobs. Operations on a job raise ``NotFoundError`` when there is no such job."""

    @post("/post_training/supervised_fine_tune/", creates=True)
    async def supervised_fine_tune(self, request: PostTrainingSFTRequest) -> None:
        """Queue a fine-tuning job; impossible combinations raise ``InvalidRequestError`` before it is queued."""

    @post("/post_training/preference_optimize/", creates=True)
    async def preference_optimize(self, request: PostTrainingRLHFRequest) -> None:
        """Queue an alignment job."""

    @post("/post_training/train_reward_model", extension=True, creates=True)
    async def train_reward_model(self, request: PostTrainingSFTRequest) -> None:
        """Queue a job that trains a reward model, from ``model`` and preferences: the columns of an alignment's."""

    @get("/post_training/job/status")
    async def job_status(self, job_uuid: Id) -> PostTrainingJobStatusResponse:
        """Where a job stands."""

    @get("/post_training/job/logs")
    async def job_logs(
        self, job_uuid: Id, follow: Annotated[bool, EXTENSION] = False
    ) -> PostTrainingJobLogStream | AsyncIterator[PostTrainingJobLogStream]:
        """A job's log so far; with ``follow``, or to a client that accepts only an event stream, as it is written."""

    @get("/post_training/job/artifacts")
    async def job_artifacts(self, job_uuid: Id) -> PostTrainingJobArtifactsResponse:
        """The checkpoints that a job has saved so far."""

    @get("/post_training/jobs", extension=True)
    async def list_jobs(self) -> AsyncIterator[JobSummary]:
        """All jobs, newest first."""

    @post("/post_training/job/cancel", extension=True)
    async def cancel_job(self, job_uuid: Id) -> None:
        """Stop a job; raises ``ConflictError`` when it has already ended."""
