"""The contracts for code that is not async: the same methods, with the same arguments, that wait for their result.

Each method is taken from its contract, types and all, so nothing about an operation is said here but its name. A
third party's contract gets its blocking form in the same way::

    class BlockingWeather(BlockingApi, of=Weather):
        forecast = blocking(Weather.forecast)

    Client("http://127.0.0.1:8321").api(BlockingWeather).forecast(request)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar, overload

from pydantic import BaseModel

from ..apis import (
    AgenticSystem,
    Api,
    Datasets,
    Inference,
    MemoryBanks,
    Models,
    PostTraining,
    RewardScoring,
    Safety,
    SyntheticDataGeneration,
    operations,
)
from .event_loop import EventLoopThread, Pump
from .replies import BlockingStream, Stream

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
S = TypeVar("S", bound=BaseModel)
C = TypeVar("C", bound=BaseModel)


class BlockingApi:
    """Base of a contract's blocking form. Declare it with ``of=`` the contract; every operation must be there."""

    contract: ClassVar[type[Api]]

    def __init_subclass__(cls, *, of: type[Api], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.contract = of
        missing = [operation.name for operation in operations(of) if operation.name not in vars(cls)]
        if missing:
            raise TypeError(f"{cls.__name__} lacks operations of {of.__name__}: {', '.join(missing)}")

    def __init__(self, api: Api, thread: EventLoopThread) -> None:
        self._api = api
        self._thread = thread


@overload
def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, AsyncIterator[T]]],
) -> Callable[Concatenate[Any, P], Iterator[T]]: ...
@overload
def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, S]]) -> Callable[Concatenate[Any, P], S]: ...
@overload
def blocking(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, S | AsyncIterator[C]]],
) -> Callable[Concatenate[Any, P], S | Iterator[C]]: ...
@overload
def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]: ...
def blocking(method: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """The blocking form of a contract's method: it waits, and an async iterator comes back as a ``BlockingStream``."""

    @wraps(method, updated=())
    def call(self: BlockingApi, *args: Any, **kwargs: Any) -> Any:
        reply = self._thread.run(getattr(self._api, method.__name__)(*args, **kwargs))
        return BlockingStream(Pump(self._thread, Stream(reply))) if isinstance(reply, AsyncIterator) else reply

    return call


class BlockingInference(BlockingApi, of=Inference):
    """Text generation by Llama models."""

    models = blocking(Inference.models)
    completion = blocking(Inference.completion)
    chat_completion = blocking(Inference.chat_completion)
    batch_completion = blocking(Inference.batch_completion)
    batch_chat_completion = blocking(Inference.batch_chat_completion)
    embeddings = blocking(Inference.embeddings)
    add_adapter = blocking(Inference.add_adapter)
    remove_adapter = blocking(Inference.remove_adapter)


class BlockingSafety(BlockingApi, of=Safety):
    """Shields over messages."""

    shields = blocking(Safety.shields)
    run_shield = blocking(Safety.run_shield)


class BlockingMemoryBanks(BlockingApi, of=MemoryBanks):
    """Documents that can be searched."""

    create = blocking(MemoryBanks.create)
    list_banks = blocking(MemoryBanks.list_banks)
    drop = blocking(MemoryBanks.drop)
    insert = blocking(MemoryBanks.insert)
    update = blocking(MemoryBanks.update)
    get_documents = blocking(MemoryBanks.get_documents)
    delete_documents = blocking(MemoryBanks.delete_documents)
    query = blocking(MemoryBanks.query)
    preview = blocking(MemoryBanks.preview)


class BlockingAgenticSystem(BlockingApi, of=AgenticSystem):
    """Agents with tools, memory and shields."""

    create = blocking(AgenticSystem.create)
    execute = blocking(AgenticSystem.execute)
    delete_agent = blocking(AgenticSystem.delete_agent)
    list_agents = blocking(AgenticSystem.list_agents)


class BlockingDatasets(BlockingApi, of=Datasets):
    """Tables of training data."""

    create_dataset = blocking(Datasets.create_dataset)
    get_dataset = blocking(Datasets.get_dataset)
    delete_dataset = blocking(Datasets.delete_dataset)
    list_datasets = blocking(Datasets.list_datasets)
    read = blocking(Datasets.read)
    store = blocking(Datasets.store)
    hold = blocking(Datasets.hold)
    release = blocking(Datasets.release)


class BlockingPostTraining(BlockingApi, of=PostTraining):
    """Fine-tuning and alignment, as jobs."""

    supervised_fine_tune = blocking(PostTraining.supervised_fine_tune)
    preference_optimize = blocking(PostTraining.preference_optimize)
    train_reward_model = blocking(PostTraining.train_reward_model)
    job_status = blocking(PostTraining.job_status)
    job_logs = blocking(PostTraining.job_logs)
    job_artifacts = blocking(PostTraining.job_artifacts)
    list_jobs = blocking(PostTraining.list_jobs)
    cancel_job = blocking(PostTraining.cancel_job)


class BlockingRewardScoring(BlockingApi, of=RewardScoring):
    """How good an answer is, as a number."""

    models = blocking(RewardScoring.models)
    score = blocking(RewardScoring.score)


class BlockingSyntheticDataGeneration(BlockingApi, of=SyntheticDataGeneration):
    """Training data made by models."""

    generate = blocking(SyntheticDataGeneration.generate)


class BlockingModels(BlockingApi, of=Models):
    """The catalogue of what is served."""

    list_models = blocking(Models.list_models)
