"""Checks of SyntheticDataGeneration."""

from __future__ import annotations

from typing import Any

from ...apis import Datasets, SyntheticDataGeneration
from ...apis.common import Message
from ...apis.datasets import ReadDatasetRequest
from ...apis.synthetic_data_generation import (
    FilteringFunction,
    RewardScoringSettings,
    StoreAs,
    SyntheticDataGenerationRequest,
    SyntheticDataGenerationResponse,
)
from ...errors import AlreadyExistsError, ConflictError, ModelNotFoundError, NotFoundError
from .checks import Skipped, check, everything, refused
from .subject import Subject

_PROMPTS = [Message.user("Say hello."), Message.user("What is the capital of Norway?")]


async def _made(subject: Subject, function: FilteringFunction, **settings: Any) -> SyntheticDataGenerationResponse:
    given: dict[str, Any] = {"n_samples": 4, "seed": 7, "temperature": 1.0} | settings
    request = SyntheticDataGenerationRequest(
        prompts=_PROMPTS, filtering_function=function, reward_scoring=RewardScoringSettings(**given)
    )
    return await subject.client.synthetic_data_generation.generate(request)


def _counts(made: SyntheticDataGenerationResponse) -> list[int]:
    return [len(prompt.k_scored_generations) for prompt in made.synthetic_data]


@check(SyntheticDataGeneration)
async def none_keeps_all(subject: Subject) -> None:
    """Without a filter every prompt has all of its samples, under the prompts in their order."""
    made = await _made(subject, FilteringFunction.NONE)
    assert [prompt.prompt for prompt in made.synthetic_data] == _PROMPTS, "the prompts are others or out of order"
    assert _counts(made) == [4, 4], f"{_counts(made)} answers to 4 samples each"


@check(SyntheticDataGeneration)
async def top_k_keeps_the_best(subject: Subject) -> None:
    """top_k keeps k answers a prompt, and none that is left out scored more."""
    everything = await _made(subject, FilteringFunction.NONE)
    kept = await _made(subject, FilteringFunction.TOP_K, k=2)
    assert _counts(kept) == [2, 2], f"{_counts(kept)} answers for k = 2"
    for all_of_it, best in zip(everything.synthetic_data, kept.synthetic_data, strict=True):
        scores = sorted((one.score for one in all_of_it.k_scored_generations), reverse=True)
        assert sorted((one.score for one in best.k_scored_generations), reverse=True) == scores[:2], "not the best"


@check(SyntheticDataGeneration)
async def a_seed_repeats_what_was_made(subject: Subject) -> None:
    """The same request with the same seed makes and keeps the same answers."""
    for function in (FilteringFunction.RANDOM, FilteringFunction.SIGMOID, FilteringFunction.TOP_P):
        first, second = [await _made(subject, function) for _ in range(2)]
        assert first.synthetic_data == second.synthetic_data, f"{function.value} keeps others the second time"


@check(SyntheticDataGeneration)
async def random_keeps_half(subject: Subject) -> None:
    """random keeps half of the answers."""
    kept = sum(_counts(await _made(subject, FilteringFunction.RANDOM)))
    assert kept == 4, f"{kept} of 8"


@check(SyntheticDataGeneration)
async def a_filter_never_adds(subject: Subject) -> None:
    """Every filter keeps at most what there is, and the two joined at most what each keeps."""
    kept = {function: _counts(await _made(subject, function, k=2, p=0.5)) for function in FilteringFunction}
    assert all(max(counts, default=0) <= 4 for counts in kept.values()), f"{kept}"
    both = sum(kept[FilteringFunction.TOP_K_TOP_P])
    assert both <= min(sum(kept[FilteringFunction.TOP_K]), sum(kept[FilteringFunction.TOP_P])), f"{kept}"


@check(SyntheticDataGeneration)
async def nothing_below_the_threshold_is_kept(subject: Subject) -> None:
    """Whatever the filter, an answer that scores less than the threshold is left out."""
    made = await _made(subject, FilteringFunction.NONE)
    scores = [one.score for prompt in made.synthetic_data for one in prompt.k_scored_generations]
    for function in FilteringFunction:
        kept = await _made(subject, function, threshold=max(scores), k=4)
        low = [one.score for prompt in kept.synthetic_data for one in prompt.k_scored_generations]
        assert min(low, default=max(scores)) >= max(scores), f"{function.value} keeps {min(low)}"
    assert _counts(await _made(subject, FilteringFunction.NONE, threshold=max(scores) + 1)) == [0, 0]


@check(SyntheticDataGeneration)
async def what_is_stored_is_what_was_kept(subject: Subject) -> None:
    """``store_as`` makes the kept answers a dataset, a row each; the id of other data is a 409."""
    if Datasets not in await subject.served():
        raise Skipped("no datasets are served beside it")
    uuid = subject.new_id("dataset")
    request = SyntheticDataGenerationRequest(
        prompts=_PROMPTS,
        filtering_function=FilteringFunction.TOP_K,
        reward_scoring=RewardScoringSettings(n_samples=3, k=2, seed=7),
        store_as=StoreAs(dataset_uuid=uuid),
    )
    made = await subject.client.synthetic_data_generation.generate(request)
    try:
        dataset = await subject.client.datasets.get_dataset(uuid)
        rows = await everything(await subject.client.datasets.read(ReadDatasetRequest(dataset=dataset)))
        scores = [one.score for prompt in made.synthetic_data for one in prompt.k_scored_generations]
        assert [row["score"] for row in rows] == scores, f"{len(rows)} rows of {len(scores)} answers"
        await subject.client.synthetic_data_generation.generate(request)
        other = request.model_copy(update={"filtering_function": FilteringFunction.NONE})
        await refused(subject.client.synthetic_data_generation.generate(other), AlreadyExistsError, ConflictError)
    finally:
        await subject.client.datasets.delete_dataset(uuid)


@check(SyntheticDataGeneration)
async def a_model_that_is_not_served_is_404(subject: Subject) -> None:
    """A generator or a reward model that nobody serves is refused with 404."""
    unknown = subject.new_id("no-model")
    for settings in (RewardScoringSettings(generator=unknown), RewardScoringSettings(model=unknown)):
        request = SyntheticDataGenerationRequest(
            prompts=_PROMPTS,
            filtering_function=FilteringFunction.TOP_K,
            reward_scoring=settings,
        )
        await refused(subject.client.synthetic_data_generation.generate(request), ModelNotFoundError, NotFoundError)
