"""Reward models: trained from pairs, stored as transformers stores them, and asked through the API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llama_stack_meta_reference.config import RewardConfig
from llama_stack_meta_reference.llama.checkpoint import load_score, open_checkpoint
from llama_stack_meta_reference.reward import serve
from llama_stack_meta_reference.training.plan import Step
from transformers import LlamaForSequenceClassification

from llama_stack.apis import RewardScoring
from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.reward_scoring import PromptGenerations, RewardScoringRequest
from llama_stack.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from tests.providers.meta_reference.training.jobs import events, make_job, train

pytestmark = pytest.mark.anyio


@pytest.fixture
def rewards(worded_checkpoint: Path, tmp_path: Path) -> Path:
    """A reward model that prefers polite answers."""
    job = make_job(
        tmp_path / "job", worded_checkpoint, kind="reward", algorithm="full", training={"n_epochs": 4, "batch_size": 4}
    )
    train(job)
    assert events(job, Step)[-1].accuracy == 1
    return job / "result"


def request(*answers: str, model: str = "polite", dialog: int = 1) -> RewardScoringRequest:
    generations = PromptGenerations(
        dialog=Dialog(message=Message.user("Where is number 77?")),
        k_generations=[Message.assistant(answer) for answer in answers],
    )
    return RewardScoringRequest(model=model, prompt_generations=[generations] * dialog)


def configured(folder: Path, **settings: object) -> RewardConfig:
    values = {
        "models": {"polite": {"checkpoint": str(folder), "device": "cpu", **settings}},
        "aliases": {"a": "polite"},
    }
    return RewardConfig.read(values)


async def test_answers_come_back_with_their_scores_in_order(rewards: Path) -> None:
    """However they are portioned: the score of an answer is its own."""
    for portion_tokens in (1, 4096):
        async with serve(configured(rewards, portion_tokens=portion_tokens)) as provider:
            asked = request("It is in Oslo, I think.", "No idea about Oslo", dialog=2)
            answered = await provider.score(asked)
            assert len(answered.scored_generations) == 2
            for scored in answered.scored_generations:
                assert scored.prompt == asked.prompt_generations[0].dialog.message
                polite, blunt = scored.k_scored_generations
                assert polite.message.content == "It is in Oslo, I think."
                assert polite.score > blunt.score + 0.1


async def test_a_reward_model_is_a_sequence_classifier_of_transformers(rewards: Path) -> None:
    """The same layout, and the same number for the same tokens."""
    theirs = LlamaForSequenceClassification.from_pretrained(rewards)
    async with serve(configured(rewards)) as provider:
        model = provider._models["polite"]  # type: ignore[attr-defined]
        sample = model.encoder.answer([Message.user("Where is Oslo?")], Message.assistant("There."))
        with torch.no_grad():
            expected = float(theirs(input_ids=torch.tensor([sample.tokens])).logits[0, 0])
        assert model.scores([sample])[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["lora", "qlora"])
async def test_adapters_are_worked_into_a_reward_model(algorithm: str, worded_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", worded_checkpoint, kind="reward", algorithm=algorithm)
    trainer = train(job)
    score = trainer.network.head.score
    assert score is not None
    assert torch.equal(load_score(open_checkpoint(job / "result", has_score=True)), score.weight)


async def test_names_are_those_of_the_distribution(rewards: Path) -> None:
    async with serve(configured(rewards)) as provider:
        assert isinstance(provider, RewardScoring)
        assert [(model.model, model.alias_of) for model in await provider.models()] == [
            ("polite", None),
            ("a", "polite"),
        ]
        assert len((await provider.score(request("x", model="a"))).scored_generations) == 1
        with pytest.raises(ModelNotFoundError, match="served: a, polite"):
            await provider.score(request("x", model="b"))


async def test_an_answer_that_cannot_be_scored_is_named(rewards: Path) -> None:
    async with serve(configured(rewards)) as provider:
        with pytest.raises(InvalidRequestError, match=r"k_generations/1: .*longer than the model's context of 128"):
            await provider.score(request("short", "mat " * 200))
        user = PromptGenerations(dialog=Dialog(message=Message.user("?")), k_generations=[Message.user("!")])
        with pytest.raises(InvalidRequestError, match=r"k_generations/0: .*assistant"):
            await provider.score(RewardScoringRequest(model="a", prompt_generations=[user]))


def test_each_kind_of_model_is_refused_in_the_place_of_the_other(rewards: Path, worded_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="writes nothing"):
        open_checkpoint(rewards)
    with pytest.raises(CheckpointError, match="gives no scores"):
        open_checkpoint(worded_checkpoint, has_score=True)


def test_a_reward_model_without_its_row_is_refused(rewards: Path, worded_checkpoint: Path) -> None:
    config = json.loads((worded_checkpoint / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (worded_checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing: score.weight"):
        open_checkpoint(worded_checkpoint, has_score=True)
