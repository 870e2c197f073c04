"""What jobs have saved, as URLs, and what a request may begin with: a model by name, or a checkpoint by its URL.

Nothing that a request names is read but safetensors and JSON (RELIABILITY R2), and no link leads out of a folder.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes

from llama_stack.apis.inference import Inference, LocalModel
from llama_stack.apis.post_training import Checkpoint
from llama_stack.errors import InvalidRequestError, ModelNotFoundError, UrlNotAllowedError

from ..training.plan import CHECKPOINTS_FOLDER, MANIFEST_FILE, RESULT_FOLDER, TRIALS_FOLDER, TrainingPlan
from .config import PostTrainingConfig
from .jobs import Jobs

_CHECKPOINT = re.compile(r"iters-(\d{8,12})")
_LONGEST_URL = 8192
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def saved(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a job's folder, oldest first. Blocks on the disk."""
    found = []
    for iters, path in _saved(folder):
        found.append(Checkpoint(iters=iters, path=path.as_uri()))
    return found


def _saved(folder: Path) -> list[tuple[int, Path]]:
    root = folder / CHECKPOINTS_FOLDER
    if not root.is_dir():
        return []
    named = ((_CHECKPOINT.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(name[1]), path) for name, path in named if name and (path / MANIFEST_FILE).is_file())


def result(folder: Path) -> Path | None:
    """The folder of a job's result, once it is there. Blocks on the disk."""
    path = folder / RESULT_FOLDER
    return path if (path / MANIFEST_FILE).is_file() else None


def iterations_saved(folder: Path) -> int:
    """How many iterations a crash cannot take from a job any more, over all trials of a search; -1 where nothing is
    saved. Blocks on the disk.
    """
    trials = folder / TRIALS_FOLDER
    folders = [folder, *(trials.iterdir() if trials.is_dir() else ())]
    newest = [checkpoints[-1][0] for each in folders if (checkpoints := _saved(each))]
    return sum(newest) if newest else -1


def is_adapter(folder: Path) -> bool:
    """Whether a folder of weights holds an adapter rather than a whole model."""
    return (folder / _ADAPTER[0]).is_file()


@dataclass(frozen=True)
class Beginning:
    """What a training begins with."""

    weights: Path
    adapter: Path | None
    base: str | None
    """The served model that the result will belong to; None where nothing here serves it."""
    parent: str
    """What to call it: a model or a job."""
    algorithm: Literal["full", "lora", "qlora"] = "full"
    """How to go on with it where the request does not say: with an adapter as it was made, else with all weights."""


class Beginnings:
    """Finds what requests name."""

    def __init__(self, config: PostTrainingConfig, jobs: Jobs, folder: Path, inference: Inference | None) -> None:
        self._config = config
        self._jobs = jobs
        self._folder = folder
        self._inference = inference

    async def model(self, name: str) -> Beginning:
        """A model that this stack serves or that the distribution names. Raises ``ModelNotFoundError``."""
        configured = self._config.models.get(name)
        if configured is not None:
            return Beginning(_absolute(configured), None, None, name)
        models = await self._inference.local_models() if self._inference is not None else []
        found = _called(name, models)
        if found is None:
            served = [each for model in models for each in (model.model, *model.aliases)]
            raise ModelNotFoundError(name, [*served, *self._config.models])
        if not found.is_adapter:
            return Beginning(found.folder, None, found.model, found.model)
        base = _called(found.base or "", models)
        if base is None:
            raise ModelNotFoundError(name, [model.model for model in models if not model.is_adapter])
        algorithm: Literal["lora", "qlora"] = "qlora" if found.lineage.get("algorithm") == "qlora" else "lora"
        return Beginning(base.folder, found.folder, base.model, found.model, algorithm)

    async def url(self, url: str) -> Beginning:
        """The checkpoint at a ``file:`` URL: one of this stack's jobs, or one below ``checkpoint_roots``.

        Raises ``UrlNotAllowedError``, and ``InvalidRequestError`` for what is no checkpoint.
        """
        path = _path(url)
        if path.is_relative_to(self._folder):
            return await self._of_job(path)
        root = next((root for root in self._config.checkpoint_roots if path.is_relative_to(root)), None)
        if root is None or not root.is_absolute():
            raise UrlNotAllowedError(
                "the checkpoint is none of this stack's jobs and not below a folder that may be read from "
                "(checkpoint_roots)",
                param="finetuned_model",
            )
        await asyncio.to_thread(_check_folder, path, root)
        if not await asyncio.to_thread(is_adapter, path):
            return Beginning(path, None, None, path.name)
        base = await asyncio.to_thread(_adapted_model, path)
        found = await self.model(base)
        if found.adapter is not None:
            raise InvalidRequestError(f"the adapter names {base!r} as its base, which is an adapter itself")
        return Beginning(found.weights, path, found.base, path.name, "lora")

    async def _of_job(self, path: Path) -> Beginning:
        parts = path.relative_to(self._folder).parts
        is_saved = parts[1:] == (RESULT_FOLDER,) or (
            len(parts) == 3 and parts[1] == CHECKPOINTS_FOLDER and _CHECKPOINT.fullmatch(parts[2])
        )
        job = await self._jobs.of_folder(parts[0]) if is_saved else None
        if job is None or not await asyncio.to_thread((path / MANIFEST_FILE).is_file):
            raise InvalidRequestError(
                "the URL names no checkpoint that a job has saved; take a path that job/artifacts gives",
                param="finetuned_model",
            )
        await asyncio.to_thread(_check_folder, path, self._folder)
        if job.kind == "reward":
            raise InvalidRequestError("the checkpoint is a reward model, which writes no text", param="finetuned_model")
        plan = TrainingPlan.model_validate_json(job.plan)
        if not await asyncio.to_thread(is_adapter, path):
            return Beginning(path, None, job.base, job.uuid)
        return Beginning(plan.base, path, job.base, job.uuid, "qlora" if plan.algorithm == "qlora" else "lora")


def _absolute(folder: str) -> Path:
    return Path(folder).expanduser().absolute()


def _called(name: str, models: Iterable[LocalModel]) -> LocalModel | None:
    return next((model for model in models if name in (model.model, *model.aliases)), None)


def _path(url: str) -> Path:
    if not url.startswith("file:"):
        raise UrlNotAllowedError(
            "weights are not fetched; give the file: URL of a checkpoint here, such as a path of job/artifacts",
            param="finetuned_model",
        )
    found = re.fullmatch(r"file://(/[^?#\\]*)", url) if len(url) <= _LONGEST_URL else None
    try:
        text = unquote_to_bytes(found[1]).decode("utf-8").rstrip("/") if found else ""
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text or any(part in (".", "..", "") for part in text.split("/")[1:]):
        raise UrlNotAllowedError(
            "the file: URL is not of the form file:///ABSOLUTE/PATH, without '.' and '..'", param="finetuned_model"
        )
    return Path(text)


def _check_folder(path: Path, root: Path) -> None:
    """Raise unless the folder lies below ``root`` without a link on the way, and holds weights in safetensors."""
    try:
        if path.resolve(strict=True) != root.resolve() / path.relative_to(root):
            raise UrlNotAllowedError("the checkpoint lies behind a link", param="finetuned_model")
        names = {each.name for each in path.iterdir() if each.is_file() and not each.is_symlink()}
    except OSError as error:
        raise InvalidRequestError("the URL names no folder that can be read", param="finetuned_model") from error
    if not ("config.json" in names and names.intersection(_WEIGHTS)) and not names.issuperset(_ADAPTER):
        raise InvalidRequestError(
            "the folder holds neither config.json with model.safetensors nor adapter_config.json with "
            "adapter_model.safetensors; weights in another form are not read from a URL",
            param="finetuned_model",
        )


def _adapted_model(path: Path) -> str:
    try:
        text = (path / _ADAPTER[0]).read_bytes()[:2_000_000]
        base = json.loads(text)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = None
    if not isinstance(base, str) or not base:
        raise InvalidRequestError(
            "adapter_config.json does not say on which model the adapter belongs (base_model_name_or_path)",
            param="finetuned_model",
        )
    return base
