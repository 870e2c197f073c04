"""The provider ``synthetic_data``: answers sampled, scored, filtered, and kept as a dataset where asked.

Everything is drawn from one seed: the same request on the same models gives the same data. A prompt is one unit of work
from sampling to filtering; several run at a time, and the first failure ends the request, for half of a data set that
looks like a whole one misleads.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_stack.apis import Datasets, Inference, RewardScoring, SyntheticDataGeneration
from llama_stack.apis.common import Dialog, JsonObject, Message, SamplingParams, SamplingStrategy, StopReason
from llama_stack.apis.datasets import ColumnKind, Dataset, StoreDatasetRequest
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse
from llama_stack.apis.reward_scoring import (
    KScoredPromptGenerations,
    PromptGenerations,
    RewardScoringRequest,
    ScoredMessage,
)
from llama_stack.apis.synthetic_data_generation import (
    FilteringFunction,
    RewardScoringSettings,
    RowLayout,
    StoreAs,
    SyntheticDataGenerationRequest,
    SyntheticDataGenerationResponse,
)
from llama_stack.errors import (
    AlreadyExistsError,
    FieldFault,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    UpstreamError,
)

from ..config import SyntheticDataConfig
from .filters import FilterSettings, kept

ORIGIN = "synthetic_data"
"""The key of a stored dataset's metadata that says how it was made."""
_DIALOGS = {"dialog": ColumnKind.DIALOG, "score": ColumnKind.NUMBER}
_PREFERENCES = {"prompt": ColumnKind.DIALOG, "chosen": ColumnKind.DIALOG, "rejected": ColumnKind.DIALOG}


@dataclass(frozen=True)
class Settings:
    """What a request says, and the distribution where it says nothing."""

    model: str
    generator: str
    n_samples: int
    k: int
    p: float
    threshold: float | None
    temperature: float
    seed: int


@dataclass(frozen=True)
class Made:
    """All answers to one prompt, and the places of those that were kept."""

    prompt: Message
    answers: Sequence[ScoredMessage]
    cut: int
    """How many of them ended because they were long enough."""
    kept: Sequence[int]


class SyntheticData(SyntheticDataGeneration):
    """Data by the distribution's own models."""

    def __init__(
        self,
        config: SyntheticDataConfig,
        inference: Inference,
        reward_scoring: RewardScoring,
        datasets: Datasets | None,
    ) -> None:
        self._config = config
        self._inference = inference
        self._reward_scoring = reward_scoring
        self._datasets = datasets

    async def generate(self, request: SyntheticDataGenerationRequest) -> SyntheticDataGenerationResponse:
        settings = self._settings(request.reward_scoring or RewardScoringSettings())
        await self._check(request, settings)
        made = await self._made(request, settings)
        told = _statistics(made, settings, request.filtering_function)
        if request.store_as is not None:
            told["dataset"] = await self._store(request.store_as, _origin(request, settings), made)
        return SyntheticDataGenerationResponse(
            synthetic_data=[
                KScoredPromptGenerations(
                    prompt=one.prompt, k_scored_generations=[one.answers[place] for place in one.kept]
                )
                for one in made
            ],
            statistics=told,
        )

    def _settings(self, asked: RewardScoringSettings) -> Settings:
        names = Settings.__dataclass_fields__
        given = asked.model_dump(exclude_none=True)
        return Settings(**{name: given.get(name, getattr(self._config, name)) for name in names})

    async def _check(self, request: SyntheticDataGenerationRequest, settings: Settings) -> None:
        """Refuse what cannot come to a good end before anything is sampled."""
        samples = len(request.prompts) * settings.n_samples
        if samples > self._config.max_samples:
            raise InvalidRequestError(
                f"{len(request.prompts)} prompts with {settings.n_samples} samples each make {samples}, and a request "
                f"may ask for {self._config.max_samples}; split the request",
                param="prompts",
            )
        served = [model.model for model in await self._reward_scoring.models()]
        if settings.model not in served:
            raise ModelNotFoundError(settings.model, served)
        if request.store_as is None:
            return
        if self._datasets is None:
            raise InvalidRequestError("this distribution serves no datasets; leave out 'store_as'", param="store_as")
        uuid = request.store_as.dataset_uuid
        try:
            there = await self._datasets.get_dataset(uuid)
        except NotFoundError:
            return
        if there.metadata.get(ORIGIN) != _origin(request, settings):
            raise AlreadyExistsError("dataset", uuid, param="store_as")

    async def _made(self, request: SyntheticDataGenerationRequest, settings: Settings) -> list[Made]:
        free = asyncio.Semaphore(self._config.concurrency)
        tasks: list[asyncio.Task[Made]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for place, prompt in enumerate(request.prompts):
                    work = self._make(prompt, place, request.filtering_function, settings, free)
                    tasks.append(group.create_task(work))
        except ExceptionGroup as failures:  # one is told: the others were cancelled, or failed alike
            raise _first(failures) from None
        return [task.result() for task in tasks]

    async def _make(
        self, prompt: Message, place: int, function: FilteringFunction, settings: Settings, free: asyncio.Semaphore
    ) -> Made:
        async def sample(number: int) -> ChatCompletionResponse:
            async with free:
                return await self._sample(prompt, _drawn(settings.seed, place, number), settings)

        tasks: list[asyncio.Task[ChatCompletionResponse]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(sample(number)) for number in range(settings.n_samples)]
        except ExceptionGroup as failures:
            raise _of_prompt(_first(failures), place) from None
        replies = [task.result() for task in tasks]
        answers = await self._scored(prompt, [Message.assistant(r.content, r.tool_calls) for r in replies], settings)
        scores = [answer.score for answer in answers]
        limits = FilterSettings(settings.k, settings.p, settings.threshold)
        return Made(
            prompt,
            answers,
            sum(reply.stop_reason is StopReason.MAX_TOKENS for reply in replies),
            kept(function, scores, limits, f"{settings.seed}/{place}"),
        )

    async def _sample(self, prompt: Message, seed: int, settings: Settings) -> ChatCompletionResponse:
        sampling = SamplingParams()
        if settings.temperature > 0:
            sampling = SamplingParams(
                temperature=settings.temperature,
                strategy=SamplingStrategy.TOP_P,
                top_p=self._config.top_p,
                seed=seed,
            )
        reply = await self._inference.chat_completion(
            ChatCompletionRequest(
                model=settings.generator,
                dialog=Dialog(message=prompt),
                sampling_params=sampling,
                max_tokens=self._config.max_tokens,
            )
        )
        assert isinstance(reply, ChatCompletionResponse)
        return reply

    async def _scored(self, prompt: Message, answers: list[Message], settings: Settings) -> Sequence[ScoredMessage]:
        asked = PromptGenerations(dialog=Dialog(message=prompt), k_generations=answers)
        scored = await self._reward_scoring.score(
            RewardScoringRequest(model=settings.model, prompt_generations=[asked])
        )
        found = [answer for one in scored.scored_generations for answer in one.k_scored_generations]
        if len(found) != len(answers):
            raise UpstreamError(f"the reward model {settings.model!r} scored {len(found)} of {len(answers)} answers")
        return found

    async def _store(self, store_as: StoreAs, origin: JsonObject, made: Sequence[Made]) -> JsonObject:
        assert self._datasets is not None
        is_dialogs = store_as.layout is RowLayout.DIALOGS
        rows = _dialogs(made) if is_dialogs else _preferences(made)
        stored: Dataset = await self._datasets.store(
            StoreDatasetRequest(
                uuid=store_as.dataset_uuid,
                columns=_DIALOGS if is_dialogs else _PREFERENCES,
                rows=rows,
                metadata={**store_as.metadata, ORIGIN: origin},
            )
        )
        return {"uuid": store_as.dataset_uuid, "rows": len(rows), "content_url": stored.content_url}


def _drawn(seed: int, place: int, number: int) -> int:
    """The seed of one sample: its own, and the same whenever the request is made again."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}/{number}".encode()).digest()[:8]) >> 1


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


def _of_prompt(failure: BaseException, place: int) -> BaseException:
    """The failure, told of the prompt that it is about where that is what must be changed."""
    if not isinstance(failure, InvalidRequestError):
        return failure
    fault = FieldFault(f"/prompts/{place}", failure.code, failure.detail)
    told = f"prompt {place + 1}: {failure.detail}"
    return InvalidRequestError.revive(failure.code, told, param="prompts", faults=[fault], extra=failure.extra)


def _origin(request: SyntheticDataGenerationRequest, settings: Settings) -> JsonObject:
    """How the data is made: the settings, and a hash of prompts and layout."""
    assert request.store_as is not None
    asked = [prompt.model_dump(mode="json", exclude_none=True) for prompt in request.prompts]
    whole = json.dumps([asked, request.store_as.layout.value], sort_keys=True).encode()
    return {
        **_told(settings),
        "filtering_function": request.filtering_function.value,
        "prompts_sha256": hashlib.sha256(whole).hexdigest(),
    }


def _told(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in vars(settings).items() if value is not None}


def _message(message: Message) -> JsonObject:
    return message.model_dump(mode="json", exclude_none=True)


def _dialogs(made: Sequence[Made]) -> list[JsonObject]:
    return [
        {"dialog": [_message(one.prompt), _message(one.answers[place].message)], "score": one.answers[place].score}
        for one in made
        for place in one.kept
    ]


def _preferences(made: Sequence[Made]) -> list[JsonObject]:
    rows: list[JsonObject] = []
    for one in made:
        if not one.kept:
            continue
        best = max((one.answers[place] for place in one.kept), key=lambda answer: answer.score)
        worst = min(one.answers, key=lambda answer: answer.score)
        if worst.score < best.score:
            rows.append(
                {
                    "prompt": [_message(one.prompt)],
                    "chosen": [_message(best.message)],
                    "rejected": [_message(worst.message)],
                }
            )
    return rows


def _statistics(made: Sequence[Made], settings: Settings, function: FilteringFunction) -> dict[str, Any]:
    scores = [answer.score for one in made for answer in one.answers]
    good = [one.answers[place].score for one in made for place in one.kept]
    return {
        "prompts": len(made),
        "samples": len(scores),
        "distinct_samples": sum(len({answer.message.model_dump_json() for answer in one.answers}) for one in made),
        "cut_samples": sum(one.cut for one in made),
        "kept": len(good),
        "prompts_without_kept": sum(not one.kept for one in made),
        **({"score": _spread(scores)} if scores else {}),
        **({"kept_score": _spread(good)} if good else {}),
        "settings": {**_told(settings), "filtering_function": function.value},
    }


def _spread(scores: Sequence[float]) -> dict[str, float]:
    return {
        "lowest": min(scores),
        "mean": statistics.fmean(scores),
        "highest": max(scores),
        "standard_deviation": statistics.pstdev(scores),
    }
