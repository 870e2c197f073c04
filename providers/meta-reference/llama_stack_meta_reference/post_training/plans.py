"""From a request to the trainer's plan, and everything that keeps the two from fitting together.

All faults of a request are found before it is queued, each with its place in the body.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from llama_stack.apis.common import JsonObject
from llama_stack.apis.config import Config
from llama_stack.apis.post_training import (
    AdapterConfig,
    FinetuningAlgorithm,
    OptimizerConfig,
    PostTrainingRLHFRequest,
    PostTrainingSFTRequest,
    TrainingConfig,
)
from llama_stack.errors import FieldFault, InvalidRequestError, nearest

from ..training.plan import (
    ATTENTION_MODULES,
    AdapterSettings,
    LoggerSettings,
    OptimizerSettings,
    PreferenceSettings,
    SearchSettings,
    TrainingPlan,
    TrainingSettings,
)
from .checkpoints import Beginning
from .config import PostTrainingConfig
from .jobs import Kind
from .rows import column_faults

C = TypeVar("C", bound=Config)
Request = PostTrainingSFTRequest | PostTrainingRLHFRequest
LARGEST_RANK = 512
_LOGGERS = ("tensorboard", "webhook")


def request_faults(request: Request, kind: Kind, config: PostTrainingConfig) -> list[FieldFault]:
    """What is wrong with a request whatever it begins with."""
    faults = [
        *column_faults(request.dataset, kind, "/dataset"),
        *column_faults(request.validation_dataset, kind, "/validation_dataset"),
        *_training_faults(request.training_config),
        *_optimizer_faults(request.optimizer_config),
        *_search_faults(request.hyperparam_search_config),
        *_logger_faults(request.logger_config, config),
    ]
    if isinstance(request, PostTrainingSFTRequest):
        faults += _adapter_faults(request.algorithm, request.algorithm_config, kind)
        if request.algorithm is FinetuningAlgorithm.FULL:
            faults += _unvaried_faults(request.hyperparam_search_config, "algorithm full trains no adapter")
    return faults


def beginning_faults(request: Request, beginning: Beginning, *, is_tied: bool) -> list[FieldFault]:
    """What does not fit what training begins with; ``is_tied``: its output is its embedding table."""
    faults: list[FieldFault] = []
    algorithm = request.algorithm if isinstance(request, PostTrainingSFTRequest) else None
    if beginning.adapter is not None:
        if algorithm in (FinetuningAlgorithm.FULL, FinetuningAlgorithm.DORA):
            faults.append(
                _fault(
                    "/algorithm",
                    f"{beginning.parent!r} is an adapter, which training goes on with by lora or qlora, not by "
                    f"{algorithm.value}; give its base model instead",
                )
            )
        faults += _unvaried_faults(
            request.hyperparam_search_config, f"{beginning.parent!r} is an adapter and keeps its rank and alpha"
        )
    elif algorithm is None:
        faults += _unvaried_faults(
            request.hyperparam_search_config, f"{beginning.parent!r} has whole weights, and all of them are trained"
        )
    adapter = request.algorithm_config if isinstance(request, PostTrainingSFTRequest) else None
    if adapter is not None and adapter.apply_lora_to_output and is_tied and algorithm is not FinetuningAlgorithm.FULL:
        what = f"the output of {beginning.parent!r} is its embedding table, which takes no adapter; set false"
        faults.append(_fault("/algorithm_config/apply_lora_to_output", what))
    return faults


def refuse(faults: Sequence[FieldFault]) -> None:
    """Raise ``InvalidRequestError`` with these faults, if there are any."""
    if faults:
        shown = "; ".join(fault.detail for fault in faults)
        raise InvalidRequestError(shown, param=faults[0].pointer.lstrip("/").replace("/", "."), faults=faults)


def plan_of(request: Request, kind: Kind, beginning: Beginning, config: PostTrainingConfig) -> TrainingPlan:
    """The plan of a request without faults. Raises ``InvalidRequestError`` for what only the whole of it shows."""
    optimizer, training = request.optimizer_config, request.training_config
    preferences = PreferenceSettings()
    adapter = AdapterSettings()
    algorithm: Literal["full", "lora", "qlora", "dora"] = beginning.algorithm
    if isinstance(request, PostTrainingSFTRequest):
        algorithm = request.algorithm.value
        if algorithm != "full" and request.algorithm_config is not None:
            adapter = _adapter(request.algorithm_config, is_merged=algorithm == "dora")
    else:
        preferences = PreferenceSettings(**request.algorithm_config.model_dump())
    try:
        return TrainingPlan(
            kind=kind,
            base=beginning.weights,
            adapter=beginning.adapter,
            algorithm=algorithm,
            adapter_settings=adapter,
            optimizer=OptimizerSettings(
                kind=optimizer.optimizer_type.value,
                lr=optimizer.lr,
                lr_min=optimizer.lr_min,
                weight_decay=optimizer.weight_decay,
            ),
            training=TrainingSettings(
                n_epochs=training.n_epochs,
                n_iters=training.n_iters,
                batch_size=training.batch_size,
                is_shuffled=training.shuffle,
                max_tokens=config.max_tokens,
                is_checkpointing_activations=training.enable_activation_checkpointing,
                is_wrapped_fsdp=training.memory_efficient_fsdp_wrap,
                is_offloaded_fsdp=training.fsdp_cpu_offload,
                precision=config.precision,
            ),
            preferences=preferences,
            validation=Path("validation.jsonl"),
            seed=config.seed,
            device=config.device,
            save_every=config.save_every,
            keep_checkpoints=config.keep_checkpoints,
            validate_every=config.validate_every,
            search=_search(request.hyperparam_search_config),
            loggers=_loggers(request.logger_config, config),
        )
    except ValidationError as error:
        raise InvalidRequestError("; ".join(_details(error))) from error


def _training_faults(training: TrainingConfig) -> list[FieldFault]:
    faults = []
    if not (training.n_epochs or training.n_iters):
        faults.append(
            _fault("/training_config/n_epochs", "n_epochs and n_iters are both 0, which is no limit; give one of them")
        )
    if training.fsdp_cpu_offload and not training.memory_efficient_fsdp_wrap:
        faults.append(
            _fault(
                "/training_config/fsdp_cpu_offload",
                "fsdp_cpu_offload moves what memory_efficient_fsdp_wrap has sharded; set both, or neither",
            )
        )
    return faults


def _optimizer_faults(optimizer: OptimizerConfig) -> list[FieldFault]:
    faults = []
    if optimizer.lr == 0:
        faults.append(_fault("/optimizer_config/lr", "a learning rate of 0 changes nothing; give one above 0"))
    elif optimizer.lr_min > optimizer.lr:
        what = f"lr_min {optimizer.lr_min:g} is above lr {optimizer.lr:g}; it is where the rate falls to"
        faults.append(_fault("/optimizer_config/lr_min", what))
    for name in ("lr", "lr_min", "weight_decay"):
        if getattr(optimizer, name) > 100:
            faults.append(_fault(f"/optimizer_config/{name}", f"{name} is above 100, the most there may be"))
    return faults


def _adapter_faults(algorithm: FinetuningAlgorithm, config: AdapterConfig | None, kind: Kind) -> list[FieldFault]:
    if algorithm is FinetuningAlgorithm.FULL:
        return []  # what is sent beside it means nothing (spec rule G4)
    if config is None:
        return [_fault("/algorithm_config", f"algorithm {algorithm.value} needs an algorithm_config; full needs none")]
    faults = [
        _fault(
            f"/algorithm_config/lora_attn_modules/{index}",
            f"there is no attention module {name!r}{nearest(name, ATTENTION_MODULES)}; "
            f"known: {', '.join(ATTENTION_MODULES)}",
        )
        for index, name in enumerate(config.lora_attn_modules)
        if name not in ATTENTION_MODULES
    ]
    if config.rank > LARGEST_RANK:
        faults.append(
            _fault("/algorithm_config/rank", f"a rank of {config.rank} is above {LARGEST_RANK}", LARGEST_RANK)
        )
    if kind == "reward" and config.apply_lora_to_output:
        what = "a reward model has no output matrix that an adapter could add to; set false"
        faults.append(_fault("/algorithm_config/apply_lora_to_output", what))
    if not faults:
        try:
            _adapter(config, is_merged=False)
        except ValidationError as error:
            faults += [_fault("/algorithm_config", detail) for detail in _details(error)]
    return faults


def _adapter(config: AdapterConfig, *, is_merged: bool) -> AdapterSettings:
    return AdapterSettings(
        attention=tuple(ATTENTION_MODULES[name] for name in config.lora_attn_modules),
        is_on_mlp=config.apply_lora_to_mlp,
        is_on_output=config.apply_lora_to_output,
        rank=config.rank,
        alpha=config.alpha,
        is_merged=is_merged or config.apply_lora_to_output,
    )


def _search_faults(search: JsonObject) -> list[FieldFault]:
    try:
        _search(search)
    except ValidationError as error:
        return _faults_of(error, "/hyperparam_search_config", SearchSettings.model_fields)
    return []


def _unvaried_faults(search: JsonObject, why: str) -> list[FieldFault]:
    return [
        _fault(f"/hyperparam_search_config/{name}", f"a search over {name} has nothing to vary: {why}")
        for name in ("rank", "alpha")
        if search.get(name)
    ]


def _search(search: JsonObject) -> SearchSettings | None:
    return SearchSettings.model_validate_json(json.dumps(search), strict=True) if search else None


def _logger_faults(logger: JsonObject, config: PostTrainingConfig) -> list[FieldFault]:
    faults = [
        _fault(
            f"/logger_config/{name}",
            f"there is no logger {name!r}{nearest(name, _LOGGERS)}; known: {', '.join(_LOGGERS)}",
        )
        for name in logger
        if name not in _LOGGERS
    ]
    tensorboard = logger.get("tensorboard", False)
    if not isinstance(tensorboard, bool):
        faults.append(_fault("/logger_config/tensorboard", "tensorboard is true or false"))
    elif tensorboard and find_spec("tensorboard") is None:
        what = "tensorboard is not installed here; leave it out: the job's log has everything"
        faults.append(_fault("/logger_config/tensorboard", what))
    if "webhook" in logger:
        faults += _webhook_faults(logger["webhook"], config.webhook_hosts)
    return faults


def _webhook_faults(url: object, hosts: Sequence[str]) -> list[FieldFault]:
    pointer = "/logger_config/webhook"
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        host = parts.hostname if parts and parts.scheme in ("http", "https") and not parts.username else None
    except ValueError:
        host = None
    if host is None:
        return [_fault(pointer, "webhook is the URL of a server, http://HOST/PATH or https://HOST/PATH, without user")]
    if host not in hosts:
        allowed = ", ".join(hosts) or "none"
        return [_fault(pointer, f"the host {host!r} is none that events may be sent to; webhook_hosts: {allowed}")]
    return []


def _loggers(logger: JsonObject, config: PostTrainingConfig) -> LoggerSettings:
    webhook = logger.get("webhook")
    return LoggerSettings(
        is_tensorboard=bool(logger.get("tensorboard", False)),
        webhook_url=webhook if isinstance(webhook, str) else None,
        webhook_hosts=config.webhook_hosts if webhook else (),
    )


def _fault(pointer: str, detail: str, limit: float | None = None) -> FieldFault:
    return FieldFault(pointer, "combination", detail, limit)


def _faults_of(error: ValidationError, pointer: str, known: Mapping[str, Any]) -> list[FieldFault]:
    faults = []
    for each, detail in zip(error.errors(), _details(error), strict=True):
        name = str(each["loc"][0]) if each["loc"] else ""
        hint = f"{nearest(name, known)}; known: {', '.join(known)}" if each["type"] == "extra_forbidden" else ""
        faults.append(_fault("/".join([pointer, *map(str, each["loc"])]), f"{name}: {detail}{hint}".removeprefix(": ")))
    return faults


def _details(error: ValidationError) -> list[str]:
    return [each["msg"].removeprefix("Value error, ") for each in error.errors()]
