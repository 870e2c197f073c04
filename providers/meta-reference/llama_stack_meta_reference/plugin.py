"""Declares the providers of this plugin; torch is imported when a distribution names one of them, and not before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib import import_module

from llama_stack.apis import Datasets, Inference, PostTraining, RewardScoring
from llama_stack.plugins import CommandSpec, ProviderSpec, hookimpl
from llama_stack.storage import Database, Folder

from .config import MetaReferenceConfig, RewardConfig
from .post_training.config import PostTrainingConfig

llama_stack_api_version = ">=1.0,<2"


@asynccontextmanager
async def start_inference(config: MetaReferenceConfig) -> AsyncIterator[Inference]:
    """Load the models and yield the provider that serves them; on leaving, their threads are gone and memory is free.

    Raises ``CheckpointError`` for a folder that is no model, ``SetupError`` for a device that is not there and for a
    context that does not fit the memory.
    """
    # In a thread: importing torch takes seconds, and the event loop has other APIs to answer for.
    provider_module = await asyncio.to_thread(import_module, ".inference.provider", __package__)
    async with provider_module.serve(config) as provider:
        yield provider


@asynccontextmanager
async def start_post_training(
    config: PostTrainingConfig, database: Database, folder: Folder, datasets: Datasets, inference: Inference | None
) -> AsyncIterator[PostTraining]:
    """Go on with the jobs that an earlier server left, serve what they have made, and yield the provider.

    On leaving, no trainer runs any more; its job goes on at the next start.
    """
    provider_module = await asyncio.to_thread(import_module, ".post_training.provider", __package__)
    async with provider_module.serve(config, database, folder, datasets, inference) as provider:
        yield provider


@asynccontextmanager
async def start_reward_scoring(config: RewardConfig) -> AsyncIterator[RewardScoring]:
    """Load the reward models and yield the provider that scores by them.

    Raises ``CheckpointError`` for a folder that is no reward model, ``SetupError`` for a device that is not there.
    """
    reward_module = await asyncio.to_thread(import_module, ".reward", __package__)
    async with reward_module.serve(config) as provider:
        yield provider


@hookimpl
def llama_stack_providers() -> Iterable[ProviderSpec]:
    """Declare Llama inference, training and reward scoring in torch."""
    yield ProviderSpec(
        api=Inference,
        name="meta-reference",
        config=MetaReferenceConfig,
        start=start_inference,
        description="Llama 3, 3.1, 3.2 and 3.3 in torch, from Meta or Hugging Face checkpoints, on CPU or GPU",
    )
    yield ProviderSpec(
        api=RewardScoring,
        name="meta-reference",
        config=RewardConfig,
        start=start_reward_scoring,
        description="Scores by reward models that the trainer of this package makes from pairs of answers",
    )
    yield ProviderSpec(
        api=PostTraining,
        name="meta-reference",
        config=PostTrainingConfig,
        start=start_post_training,
        description="fine-tuning, preference optimisation and reward models on the same network, as jobs",
    )


@hookimpl
def llama_stack_commands() -> Iterable[CommandSpec]:
    """Declare the command that shows and ends jobs."""
    yield CommandSpec(
        name="jobs",
        help="List, watch, cancel training jobs and read their logs.",
        target="llama_stack_meta_reference.post_training.commands:jobs",
    )
