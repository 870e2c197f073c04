"""The SyntheticDataGeneration API: sample answers to prompts, score them and keep the good ones."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .common import EXTENSION, Choice, Id, Items, JsonObject, Maybe, Message, Schema, draft
from .contract import Api, post
from .reward_scoring import KScoredPromptGenerations


class FilteringFunction(Choice):
    """Which scored answers are kept (spec: settled readings, operation 24)."""

    __title__ = "The type of filtering function."

    NONE = "none"
    RANDOM = "random"
    TOP_K = "top_k"
    TOP_P = "top_p"
    TOP_K_TOP_P = "top_k_top_p"
    SIGMOID = "sigmoid"


class RewardScoringSettings(Schema):
    """How answers are made, scored and filtered; what is left out, the distribution's default decides."""

    inline = True

    model: Maybe[Id] = None
    """The reward model."""
    generator: Maybe[Id] = None
    """The chat model that writes the answers."""
    n_samples: Maybe[Annotated[int, Field(ge=1, le=1_024)]] = None
    k: Maybe[Annotated[int, Field(ge=1, le=1_024)]] = None
    p: Maybe[Annotated[float, Field(gt=0, le=1)]] = None
    threshold: Maybe[float] = None
    temperature: Maybe[Annotated[float, Field(ge=0, le=100)]] = None
    seed: Maybe[Annotated[int, Field(ge=0, lt=2**63)]] = None


class RowLayout(Choice):
    """What a row of a dataset of kept answers holds."""

    DIALOGS = "dialogs"
    """Columns ``dialog`` (prompt and answer) and ``score``: for supervised fine-tuning."""
    PREFERENCES = "preferences"
    """Columns ``prompt``, ``chosen`` and ``rejected``: for preference optimisation. A row for each prompt with a kept
    answer and a sample that scored less than the best of those: the best and the worst.
    """


class StoreAs(Schema):
    """The dataset that a result shall become."""

    dataset_uuid: Id
    layout: RowLayout = RowLayout.DIALOGS
    metadata: JsonObject = Field(default_factory=dict)


class SyntheticDataGenerationRequest(
    Schema, title="Request to generate synthetic data. A small batch of prompts and a filtering function"
):
    """Make data from prompts."""

    prompts: Items[Message]
    filtering_function: FilteringFunction = FilteringFunction.NONE
    reward_scoring: Annotated[Maybe[RewardScoringSettings], draft(type="object")] = None
    store_as: Annotated[Maybe[StoreAs], EXTENSION] = None
    """Keep the result as a dataset too; ``statistics`` then says how many rows it has."""


class SyntheticDataGenerationResponse(
    Schema,
    title="Response from the synthetic data generation."
    " Batch of (prompt, response, score) tuples that pass the threshold.",
):
    """The kept answers, prompt by prompt."""

    synthetic_data: Items[KScoredPromptGenerations]
    statistics: Maybe[JsonObject] = None


class SyntheticDataGeneration(Api, name="synthetic_data_generation"):
    """Data made by models."""

    @post("/synthetic_data_generation/generate")
    async def generate(self, request: SyntheticDataGenerationRequest) -> SyntheticDataGenerationResponse:
        """Sample, score, filter, and where ``store_as`` is given, store.

        Raises ``ModelNotFoundError`` for a generator or a reward model that is not served, and, before anything is
        sampled, ``AlreadyExistsError`` when the dataset's id is taken by other data.
        """
