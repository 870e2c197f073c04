"""Declares datasets, two kinds of reward models, and synthetic data."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from llama_stack.apis import Datasets, Inference, RewardScoring, SyntheticDataGeneration
from llama_stack.plugins import ProviderSpec, hookimpl
from llama_stack.storage import Blobs, Database

from .config import DatasetsConfig, JudgeConfig, RulesConfig, SyntheticDataConfig

llama_stack_api_version = ">=1.0,<2"


@asynccontextmanager
async def start_datasets(config: DatasetsConfig, database: Database, blobs: Blobs) -> AsyncIterator[Datasets]:
    """Descriptions in the stack's store; rows where the descriptions say, or in the stack's blobs."""
    from llama_stack.fetch import Fetcher

    from .datasets.content import Content
    from .datasets.provider import DatasetsProvider
    from .datasets.rows import RowReader
    from .datasets.store import MIGRATIONS, DatasetStore

    await database.migrate(MIGRATIONS)
    store = DatasetStore(database, blobs)
    await store.sweep()
    content = Content(Fetcher(config.fetch), blobs, config.spool_folder)
    yield DatasetsProvider(store, content, RowReader(config.rows))


@asynccontextmanager
async def start_rules(config: RulesConfig) -> AsyncIterator[RewardScoring]:
    """Rewards by rules, in process."""
    from .rewards.provider import Rewards
    from .rewards.rules import Rules

    yield Rewards({name: Rules(model) for name, model in config.models.items()}, config.aliases)


@asynccontextmanager
async def start_judge(config: JudgeConfig, inference: Inference) -> AsyncIterator[RewardScoring]:
    """Rewards by a chat model of the distribution's own inference."""
    import asyncio

    from .rewards.judge import Judge
    from .rewards.provider import Rewards

    free = asyncio.Semaphore(config.concurrency)
    yield Rewards({name: Judge(model, inference, free) for name, model in config.models.items()}, config.aliases)


@asynccontextmanager
async def start_synthetic_data(
    config: SyntheticDataConfig, inference: Inference, reward_scoring: RewardScoring, datasets: Datasets | None
) -> AsyncIterator[SyntheticDataGeneration]:
    """Samples by the distribution's own inference, scores by its own reward models."""
    from .synthetic.provider import SyntheticData

    yield SyntheticData(config, inference, reward_scoring, datasets)


@hookimpl
def llama_stack_providers() -> Iterator[ProviderSpec]:
    """One provider each of datasets and synthetic data, two of rewards."""
    yield ProviderSpec(
        api=Datasets,
        name="datasets",
        config=DatasetsConfig,
        start=start_datasets,
        description="JSON lines, CSV and Parquet by URL, checked as they are read, or kept by the stack",
    )
    yield ProviderSpec(
        api=RewardScoring,
        name="rules",
        config=RulesConfig,
        start=start_rules,
        description="rewards without a model: length, patterns, words, JSON, repetition, ending",
    )
    yield ProviderSpec(
        api=RewardScoring,
        name="judge",
        config=JudgeConfig,
        start=start_judge,
        description="rewards by any served chat model that is asked for a score",
    )
    yield ProviderSpec(
        api=SyntheticDataGeneration,
        name="synthetic_data",
        config=SyntheticDataConfig,
        start=start_synthetic_data,
        description="answers sampled, scored, filtered, and kept as a dataset where asked",
    )
