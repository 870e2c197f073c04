"""Checks of RewardScoring."""

from __future__ import annotations

import math

from ...apis import RewardScoring
from ...apis.common import Dialog, Message
from ...apis.models import ModelKind
from ...apis.reward_scoring import PromptGenerations, RewardScoringRequest, RewardScoringResponse
from ...errors import ModelNotFoundError, NotFoundError
from .checks import check, refused
from .subject import Subject

_ANSWERS = ("Oslo is the capital of Norway.", "I do not know.", "Bananas!")


def _prompt(text: str, *answers: str) -> PromptGenerations:
    dialog = Dialog(message=Message.user(text))
    return PromptGenerations(dialog=dialog, k_generations=[Message.assistant(answer) for answer in answers])


async def _score(subject: Subject, *prompts: PromptGenerations) -> RewardScoringResponse:
    model = await subject.model(ModelKind.REWARD)
    return await subject.client.reward_scoring.score(
        RewardScoringRequest(prompt_generations=list(prompts), model=model)
    )


@check(RewardScoring)
async def every_answer_has_its_score_in_its_place(subject: Subject) -> None:
    """All answers come back in the order of the request, each with a finite score, under the message they answer."""
    prompts = [_prompt("What is the capital of Norway?", *_ANSWERS), _prompt("Say hello.", "Hello!"), _prompt("Well?")]
    answer = await _score(subject, *prompts)
    assert len(answer.scored_generations) == len(prompts), f"{len(answer.scored_generations)} prompts came back"
    for asked, scored in zip(prompts, answer.scored_generations, strict=True):
        assert scored.prompt == asked.dialog.message, "a prompt is not the message of its dialog"
        assert [one.message for one in scored.k_scored_generations] == asked.k_generations, "answers are out of order"
        assert all(math.isfinite(one.score) for one in scored.k_scored_generations), "a score is not finite"


@check(RewardScoring)
async def a_score_does_not_hang_on_its_neighbours(subject: Subject) -> None:
    """An answer scores the same alone as among others, and the same again."""
    question = "What is the capital of Norway?"
    [together] = (await _score(subject, _prompt(question, *_ANSWERS))).scored_generations
    for text, one in zip(_ANSWERS, together.k_scored_generations, strict=True):
        [alone] = (await _score(subject, _prompt(question, text))).scored_generations
        far = abs(alone.k_scored_generations[0].score - one.score)
        assert far <= 1e-3 * max(1.0, abs(one.score)), f"{text!r} scores {far:g} apart when it is alone"


@check(RewardScoring)
async def nothing_to_score_is_no_error(subject: Subject) -> None:
    """A request without prompts is answered without scores."""
    assert (await _score(subject)).scored_generations == []


@check(RewardScoring)
async def a_model_that_is_not_served_is_404(subject: Subject) -> None:
    """A reward model that nobody serves is refused with 404."""
    request = RewardScoringRequest(prompt_generations=[_prompt("a", "b")], model=subject.new_id("no-model"))
    await refused(subject.client.reward_scoring.score(request), ModelNotFoundError, NotFoundError)


@check(RewardScoring)
async def an_alias_scores_as_its_model(subject: Subject) -> None:
    """Every name of a reward model gives the same scores."""
    prompt = _prompt("What is the capital of Norway?", *_ANSWERS)
    for model in await subject.models():
        if model.kind is ModelKind.REWARD and model.alias_of is not None:
            asked = [
                RewardScoringRequest(prompt_generations=[prompt], model=name) for name in (model.model, model.alias_of)
            ]
            first, second = [await subject.client.reward_scoring.score(request) for request in asked]
            assert first == second, f"{model.model} scores otherwise than {model.alias_of}"
