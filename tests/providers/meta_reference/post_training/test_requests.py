"""What cannot work is refused before it is queued, each fault with its place in the body and what would be right."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from llama_stack_meta_reference.post_training.jobs import folder_name

from llama_stack.apis import PostTraining
from llama_stack.apis.post_training import PostTrainingRLHFRequest, PostTrainingSFTRequest
from llama_stack.errors import InvalidRequestError, ModelNotFoundError, UrlNotAllowedError
from llama_stack.stack import running
from tests.providers.meta_reference.post_training.stage import dataset, distribution, dpo_body, sft_body, stack
from tests.providers.meta_reference.training.jobs import dialogs

pytestmark = pytest.mark.anyio

ADAPTER = {
    "lora_attn_modules": ["q_proj"],
    "apply_lora_to_mlp": False,
    "apply_lora_to_output": False,
    "rank": 4,
    "alpha": 8,
}
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no adapter settings": ({"algorithm": "qlora", "algorithm_config": None}, "/algorithm_config", "needs an algor"),
    "unknown module": (
        {"algorithm_config": {"lora_attn_modules": ["q_porj"]}},
        "/algorithm_config/lora_attn_modules/0",
        "did you mean 'q_proj'",
    ),
    "nothing adapted": (
        {"algorithm_config": {"lora_attn_modules": [], "apply_lora_to_mlp": False}},
        "/algorithm_config",
        "adds to no matrix",
    ),
    "a module twice": (
        {"algorithm_config": {"lora_attn_modules": ["q_proj", "wq"]}}, "/algorithm_config", "named twice",
    ),
    "rank": ({"algorithm_config": {"rank": 513}}, "/algorithm_config/rank", "above 512"),
    "no end": ({"training_config": {"n_iters": 0}}, "/training_config/n_epochs", "give one of them"),
    "offload alone": (
        {"training_config": {"fsdp_cpu_offload": True}}, "/training_config/fsdp_cpu_offload", "set both, or neither",
    ),
    "lr_min": ({"optimizer_config": {"lr_min": 0.1}}, "/optimizer_config/lr_min", "above lr 0.01"),
    "lr 0": ({"optimizer_config": {"lr": 0}}, "/optimizer_config/lr", "changes nothing"),
    "search key": (
        {"hyperparam_search_config": {"learning_rate": [1]}},
        "/hyperparam_search_config/learning_rate",
        "known: method, trials, lr",
    ),
    "search nothing": ({"hyperparam_search_config": {"trials": 3}}, "/hyperparam_search_config", "varies nothing"),
    "search type": ({"hyperparam_search_config": {"lr": "1"}}, "/hyperparam_search_config/lr", "lr: "),
    "search range": ({"hyperparam_search_config": {"rank": [4, 0]}}, "/hyperparam_search_config/rank/1", "equal to 1"),
    "search rank of full": (
        {"algorithm": "full", "hyperparam_search_config": {"rank": [4]}},
        "/hyperparam_search_config/rank",
        "full trains no adapter",
    ),
    "logger key": ({"logger_config": {"wandb": True}}, "/logger_config/wandb", "known: tensorboard, webhook"),
    "logger type": ({"logger_config": {"tensorboard": 1}}, "/logger_config/tensorboard", "true or false"),
    "webhook": ({"logger_config": {"webhook": "http://10.0.0.1/x"}}, "/logger_config/webhook", "webhook_hosts: none"),
    "webhook no url": ({"logger_config": {"webhook": "file:///x"}}, "/logger_config/webhook", "URL of a server"),
    "columns": (
        {"dataset": {"columns": {"x": "number"}}}, "/dataset/columns", "neither is there",
    ),
    "two columns": (
        {"validation_dataset": {"columns": {"a": "dialog", "b": "dialog"}}}, "/validation_dataset/columns", "are 2",
    ),
}  # fmt: skip


@pytest.fixture
async def api(worded_checkpoint: Path, tmp_path: Path) -> AsyncIterator[PostTraining]:
    """Jobs on ``base``, which no inference serves."""
    settings: dict[str, Any] = {
        "models": {"base": str(worded_checkpoint)},
        "checkpoint_roots": [str(tmp_path / "root")],
    }
    described = distribution(tmp_path, worded_checkpoint, **settings)
    del described["providers"]["inference"]
    async with running(stack(tmp_path, described)) as up:
        yield up.api(PostTraining)


async def refused(api: PostTraining, body: dict[str, Any]) -> InvalidRequestError:
    kind = PostTrainingRLHFRequest if "finetuned_model" in body else PostTrainingSFTRequest
    request = kind.model_validate_json(json.dumps(body))
    call: Any = api.preference_optimize if kind is PostTrainingRLHFRequest else api.supervised_fine_tune
    with pytest.raises(InvalidRequestError) as caught:
        await call(request)
    return caught.value


async def test_every_fault_is_named_with_its_place_and_nothing_is_queued(api: PostTraining, tmp_path: Path) -> None:
    """One by one, and all that fit together in one answer."""
    for name, (changes, pointer, what) in FAULTS.items():
        body = sft_body(tmp_path, "job", **{"model": "base"} | {k: v for k, v in changes.items() if v is not None})
        body = {k: v for k, v in body.items() if changes.get(k, v) is not None}
        error = await refused(api, body)
        assert [fault.pointer for fault in error.faults] == [pointer], name
        assert what in error.detail, (name, error.detail)
    several = {"lr_min": 1.0, "lr": 0.5}, {"n_iters": 0, "fsdp_cpu_offload": True}
    error = await refused(
        api, sft_body(tmp_path, "job", model="base", optimizer_config=several[0], training_config=several[1])
    )
    assert len(error.faults) == 3
    assert [job async for job in await api.list_jobs()] == []


async def test_what_is_not_here_is_named(api: PostTraining, tmp_path: Path) -> None:
    """An unknown model with those that can be trained; rows that cannot be read, before anybody waits for them."""
    with pytest.raises(ModelNotFoundError, match="served: base; did you mean 'base'"):
        await api.supervised_fine_tune(
            PostTrainingSFTRequest.model_validate(sft_body(tmp_path, "job", model="bass"), strict=False)
        )
    missing = dataset(tmp_path, dialogs()) | {"content_url": (tmp_path / "missing.jsonl").as_uri()}
    await refused(api, sft_body(tmp_path, "job", model="base", dataset=missing))
    wrong = dataset(tmp_path, [{"dialog": "no dialog"}], "wrong")
    assert "row 1" in (await refused(api, sft_body(tmp_path, "job", model="base", validation_dataset=wrong))).detail
    assert (
        "missing: rejected"
        in (
            await refused(
                api,
                dpo_body(
                    tmp_path,
                    "job",
                    "file:///x",
                    dataset={"columns": {"prompt": "dialog", "chosen": "dialog", "rejected": "text"}},
                ),
            )
        ).detail
    )
    assert [job async for job in await api.list_jobs()] == []


async def test_weights_are_read_from_nowhere_but_where_they_may_be(
    api: PostTraining, worded_checkpoint: Path, tmp_path: Path
) -> None:
    """Not from the network, not from elsewhere on the disk, not through links, and never as pickles."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(worded_checkpoint)
    pickled = root / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "consolidated.00.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (root / "bare").mkdir()
    (root / "bare" / "adapter_model.safetensors").touch()
    (root / "bare" / "adapter_config.json").write_text("[" * 100_000)
    jobs = next((tmp_path / "state" / "folders").iterdir())
    urls = {
        "http://example.com/model": "weights are not fetched",
        "https://example.com/model": "weights are not fetched",
        "data:text/plain,x": "weights are not fetched",
        worded_checkpoint.as_uri(): "checkpoint_roots",
        "file:///etc/passwd": "checkpoint_roots",
        f"file://{root}/../worded": "without '.' and '..'",
        f"file://{root}/%2e%2e/worded": "without '.' and '..'",
        f"file://{root}/x%00y": "without '.' and '..'",
        "file://localhost/x": "without '.' and '..'",
        "file://" + "/x" * 9000: "without '.' and '..'",
        f"file://{root}/nowhere": "no folder that can be read",
        f"file://{root}/link": "behind a link",
        f"file://{pickled}": "neither config.json with model.safetensors",
        f"file://{root}/bare": "does not say on which model",
        f"file://{jobs}/{folder_name('job')}/result": "no checkpoint that a job has saved",
        f"file://{jobs}/{folder_name('job')}/trials": "no checkpoint that a job has saved",
    }
    for url, what in urls.items():
        error = await refused(api, dpo_body(tmp_path, "job", url))
        assert what in error.detail, url
        assert isinstance(error, UrlNotAllowedError) or not url.startswith(("http", "data"))
    assert os.listdir(jobs) == []
