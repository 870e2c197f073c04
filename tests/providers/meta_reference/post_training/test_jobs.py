"""Jobs from the request to the model that they make."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from llama_stack.apis import Datasets, Inference, Models, PostTraining
from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.datasets import CreateDatasetRequest
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse
from llama_stack.apis.post_training import JobStatus, PostTrainingJobLogStream
from llama_stack.errors import AlreadyExistsError, ConflictError, NotFoundError
from llama_stack.stack import Stack
from tests.providers.meta_reference.post_training.stage import completed, dpo, ended, sft, training

pytestmark = pytest.mark.anyio


async def answer(up: Stack, model: str) -> str:
    asked = ChatCompletionRequest(model=model, dialog=Dialog(message=Message.user("Where?")), max_tokens=8)
    return str(cast(ChatCompletionResponse, await up.api(Inference).chat_completion(asked)).content)


async def listed(up: Stack) -> dict[str, dict[str, Any]]:
    return {model.model: model.metadata async for model in await up.api(Models).list_models()}


async def test_a_job_becomes_a_model_and_stays_one(worded_checkpoint: Path, tmp_path: Path) -> None:
    """LoRA, then preferences on what it made, then all weights: each is served at once, and after a restart."""
    async with training(tmp_path, worded_checkpoint) as up:
        api = up.api(PostTraining)
        before = await answer(up, "base")
        await api.supervised_fine_tune(sft(tmp_path, "polite"))
        status = await completed(api, "polite")
        assert status.scheduled_at is not None
        assert status.started_at is not None
        assert status.completed_at is not None
        assert status.scheduled_at <= status.started_at <= status.completed_at
        assert status.resources_allocated is not None
        assert status.resources_allocated["iters"] == status.resources_allocated["total_iters"] == 8
        assert {"loss", "device", "iters_per_second", "seconds_left"} <= status.resources_allocated.keys()
        assert [checkpoint.iters for checkpoint in status.checkpoints] == [4, 8, 8]
        paths = [checkpoint.path for checkpoint in (await api.job_artifacts("polite")).checkpoints]
        assert all(path.startswith("file:///") for path in paths)
        assert paths[-1].endswith("/result")

        await api.preference_optimize(dpo(tmp_path, "aligned", paths[-1]))
        await completed(api, "aligned")
        await api.supervised_fine_tune(sft(tmp_path, "whole", algorithm="dora"))
        await completed(api, "whole")
        made = await listed(up)
        assert made["polite"]["adapter_of"] == made["aligned"]["adapter_of"] == "base"
        assert "adapter_of" not in made["whole"]
        shown = {"job", "base", "parent", "kind", "algorithm"}
        assert {name: made["aligned"][name] for name in shown} == {
            "job": "aligned", "base": "base", "parent": "polite", "kind": "dpo", "algorithm": "lora",
        }  # fmt: skip
        answers = {name: await answer(up, name) for name in ("polite", "aligned", "whole")}
        assert before not in answers.values()
    async with training(tmp_path, worded_checkpoint) as up:
        assert {name: await answer(up, name) for name in answers} == answers
        assert await listed(up) == made
        assert [(job.job_uuid, job.status) async for job in await up.api(PostTraining).list_jobs()] == [
            (name, JobStatus.COMPLETED) for name in ("whole", "aligned", "polite")
        ]
        again = await up.api(PostTraining).job_status("polite")
        assert again == status


async def test_the_same_request_is_one_job(worded_checkpoint: Path, tmp_path: Path) -> None:
    """A client that did not hear the answer asks again (spec rule G10)."""
    async with training(tmp_path, worded_checkpoint) as up:
        api = up.api(PostTraining)
        for _ in range(2):
            await api.supervised_fine_tune(sft(tmp_path, "one"))
        with pytest.raises(AlreadyExistsError, match="'one'"):
            await api.supervised_fine_tune(sft(tmp_path, "one", training_config={"n_iters": 9}))
        await completed(api, "one")
        await api.supervised_fine_tune(sft(tmp_path, "one"))
        assert [job.job_uuid async for job in await api.list_jobs()] == ["one"]
        for call in (api.job_status, api.job_logs, api.job_artifacts, api.cancel_job):
            with pytest.raises(NotFoundError, match="'other'"):
                await call("other")


async def test_jobs_run_in_their_order_and_are_cancelled_waiting_or_running(
    worded_checkpoint: Path, tmp_path: Path
) -> None:
    """A cancelled job is failed, for the draft knows no other word; the next in line runs."""
    async with training(tmp_path, worded_checkpoint) as up:
        api = up.api(PostTraining)
        await api.supervised_fine_tune(sft(tmp_path, "long", training_config={"n_iters": 1_000_000}))
        for name in ("second", "third", "fourth"):
            await api.supervised_fine_tune(sft(tmp_path, name, training_config={"n_iters": 1}))
        while not (await api.job_status("long")).resources_allocated:
            await asyncio.sleep(0.05)
        found = {job.job_uuid: job.status async for job in await api.list_jobs()}
        assert [found[name].value for name in ("long", "second", "third", "fourth")] == ["running"] + ["scheduled"] * 3
        await api.cancel_job("third")
        await api.cancel_job("long")
        for name in ("long", "third"):
            status = await ended(api, name)
            assert (status.status, (status.resources_allocated or {})["reason"]) == (
                JobStatus.FAILED,
                "it was cancelled",
            )
            with pytest.raises(ConflictError, match="ended already"):
                await api.cancel_job(name)
        second, fourth = await completed(api, "second"), await completed(api, "fourth")
        assert second.completed_at is not None
        assert fourth.started_at is not None
        assert second.completed_at <= fourth.started_at
        with pytest.raises(ConflictError):
            await api.cancel_job("second")
        assert (await api.job_status("third")).started_at is None
        assert {"second", "fourth"} <= (await listed(up)).keys()
        assert not {"long", "third"} & (await listed(up)).keys()


async def test_a_log_is_told_whole_or_followed_to_the_end_of_the_job(worded_checkpoint: Path, tmp_path: Path) -> None:
    """A follower that comes early and one that comes late read the same, line for line."""
    async with training(tmp_path, worded_checkpoint) as up:
        api = up.api(PostTraining)
        await api.supervised_fine_tune(sft(tmp_path, "told"))
        followed = [line async for part in await api.job_logs("told", follow=True) for line in part.log_lines]  # type: ignore[union-attr]
        assert (await api.job_status("told")).status is JobStatus.COMPLETED
        snapshot = cast(PostTrainingJobLogStream, await api.job_logs("told"))
        assert followed == snapshot.log_lines
        words = [line.split(" ")[1] for line in followed]
        assert words[0] == "scheduled"
        assert words.count("step") == 8
        assert words[-1] == "finished"
        assert any("loss=" in line and "seconds_left=" in line for line in followed)


async def test_a_dataset_is_held_while_a_job_needs_it(worded_checkpoint: Path, tmp_path: Path) -> None:
    """From the answer to the end of the job, and not longer."""
    async with training(tmp_path, worded_checkpoint) as up:
        api, datasets = up.api(PostTraining), up.api(Datasets)
        request = sft(tmp_path, "holder", training_config={"n_iters": 1_000_000})
        await datasets.create_dataset(CreateDatasetRequest(uuid="d", dataset=request.dataset))
        await api.supervised_fine_tune(request)
        with pytest.raises(ConflictError, match="holder"):
            await datasets.delete_dataset("d")
    async with training(tmp_path, worded_checkpoint) as up:
        api, datasets = up.api(PostTraining), up.api(Datasets)
        with pytest.raises(ConflictError, match="holder"):
            await datasets.delete_dataset("d")
        await api.cancel_job("holder")
        await datasets.delete_dataset("d")


async def test_a_killed_trainer_goes_on_and_one_that_gets_nowhere_is_given_up(
    worded_checkpoint: Path, tmp_path: Path
) -> None:
    """Killed once it has saved, it resumes; killed at each start, the job fails with the reason."""
    async with training(tmp_path, worded_checkpoint, max_attempts=2, save_every=1000) as up:
        api = up.api(PostTraining)
        runner = cast(Any, up)._providers[-1].started.runner
        await api.supervised_fine_tune(sft(tmp_path, "doomed", training_config={"n_iters": 1_000_000}))
        killed = 0
        while (await api.job_status("doomed")).status is not JobStatus.FAILED:
            work = runner._works.get("doomed")
            if work is not None and work.process is not None and work.process.returncode is None:
                os.kill(work.process.pid, signal.SIGKILL)
                await work.process.wait()
                killed += 1
            await asyncio.sleep(0.01)
        assert killed == 2
        status = await api.job_status("doomed")
        assert "2 times without a new checkpoint" in str((status.resources_allocated or {})["reason"])
        lines = cast(PostTrainingJobLogStream, await api.job_logs("doomed")).log_lines
        assert sum("was ended by signal 9" in line for line in lines) == 2
        assert json.dumps(status.model_dump(mode="json"))


async def test_a_job_may_be_split_into_processes(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Two ranks under torchrun make one model."""
    async with training(tmp_path, worded_checkpoint, processes=2) as up:
        api = up.api(PostTraining)
        await api.supervised_fine_tune(sft(tmp_path, "split", training_config={"n_iters": 2}))
        status = await completed(api, "split")
        assert (status.resources_allocated or {})["processes"] == 2
