"""Training: the loop, what it needs to begin, and what it needs to go on after it was cut off at any place.

An iteration takes the next ``batch_size`` rows of its epoch's order, sums their gradients in portions of bounded size,
clips, and updates. Everything that it does follows from the plan, the rows and the number of the iteration, so a
training that goes on from a checkpoint goes on along the same losses.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llama_stack.errors import CheckpointError, InvalidRequestError

from ..llama.checkpoint import Checkpoint, load_model, open_checkpoint
from ..llama.lora import load_adapter
from ..llama.tokenizer import load_tokenizer
from . import export
from .network import Network, add_adapters, freeze, keep_trained_in_float32, new_score
from .objectives import FineTuning, Objective, Preference, Reward
from .plan import (
    CHECKPOINTS_FOLDER,
    REFERENCE_FILE,
    RESULT_FOLDER,
    STATE_FOLDER,
    AdapterSettings,
    CheckpointSaved,
    Finished,
    Note,
    Shown,
    Started,
    Step,
    Stopped,
    TrainingPlan,
    Validation,
    checkpoint_name,
)
from .progress import Progress
from .ranks import Ranks, product_type, products_in, whole
from .samples import Encoder, Rows, Sample, pack, portions, shown
from .schedule import Schedule, learning_rate
from .sharding import shard
from .state import read_tensor, restore, whole_state, write_state
from .store import newest_valid, save_checkpoint, settle, verify, write_folder

_SMOOTHED = 0.9
"""How much of the running mean of an iteration's seconds, from which the time left is told, is what it was before."""


class Measured(NamedTuple):
    """A loss and, of pairs, the share that came out the right way."""

    loss: float
    accuracy: float | None


class DivergedError(InvalidRequestError):
    """A loss or a gradient is no number any more."""


class Trainer:
    """One training, from its plan to its result. ``run`` does it; between two runs nothing is kept but the folder."""

    def __init__(self, plan: TrainingPlan, job: Path, progress: Progress, ranks: Ranks) -> None:
        """Read the base and the rows.

        Raises ``CheckpointError`` for a base or an adapter that is none, ``InvalidRequestError`` for what does not go
        together and for rows that are not what the kind needs.
        """
        self._plan, self._job, self._progress, self._ranks = plan, job, progress, ranks
        self._checkpoint: Checkpoint = open_checkpoint(plan.base)
        self._tokenizer = load_tokenizer(self._checkpoint.tokenizer)
        if self._tokenizer.vocab_size > self._checkpoint.config.vocab_size:
            raise CheckpointError(
                f"{self._checkpoint.folder}: the tokenizer has {self._tokenizer.vocab_size} tokens, "
                f"the network {self._checkpoint.config.vocab_size}"
            )
        context = self._checkpoint.config.max_context
        self._encoder = Encoder(self._tokenizer, min(plan.training.max_tokens or context, context))
        self._train = Rows(plan.train)
        self._validation = Rows(plan.validation) if plan.validation is not None else None
        if not len(self._train):
            raise InvalidRequestError("the dataset has no rows; training needs one at least")
        self._schedule = Schedule(len(self._train), plan.training, plan.seed)
        self._dtype = product_type(plan.training.precision, ranks.device)
        self._reference: Tensor | None = None
        self._objective = self._make_objective()
        self._adapter_settings = plan.adapter_settings
        self.network = self._make_network()
        self._optimizer = _optimizer(plan, self.network)
        self._iters = 0
        self._saved = 0
        self.validation: Measured | None = None
        """Of the last iteration that had one."""

    @property
    def total_iters(self) -> int:
        """How many iterations the training has."""
        return self._schedule.total_iters

    def run(self, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, or until ``is_stopping``; returns whether the result is there. Writes as plan.py says."""
        resumed = self._resume()
        self._start(resumed)
        self._keep_reference()
        seconds: float | None = None
        while self._iters < self.total_iters:
            if self._agree(is_stopping()):
                if self._saved != self._iters:
                    self._save_checkpoint()
                self._progress.tell(Stopped, iters=self._iters)
                return False
            began = time.perf_counter()
            rate = learning_rate(self._plan.optimizer, self._iters, self.total_iters)
            measured, norm, tokens = self._iterate(self._schedule.batch(self._iters), rate)
            self._iters += 1
            taken = time.perf_counter() - began
            seconds = taken if seconds is None else _SMOOTHED * seconds + (1 - _SMOOTHED) * taken
            self._progress.tell(
                Step,
                iters=self._iters,
                loss=measured.loss,
                accuracy=measured.accuracy,
                learning_rate=rate,
                gradient_norm=norm,
                tokens_per_second=tokens / taken,
                seconds_left=seconds * (self.total_iters - self._iters),
            )
            if self._is_due(self._plan.validate_every):
                self._validate()
            if self._is_due(self._plan.save_every):
                self._save_checkpoint()
        self._finish()
        return True

    def _is_due(self, every: int) -> bool:
        return self._iters == self.total_iters or (bool(every) and self._iters % every == 0)

    def _agree(self, is_stopping: bool) -> bool:
        return self._ranks.sums([float(is_stopping)])[0] > 0

    # What is trained

    def _make_objective(self) -> Objective:
        if self._plan.kind == "sft":
            return FineTuning(self._encoder)
        if self._plan.kind == "reward":
            return Reward(self._encoder)
        return Preference(self._encoder, self._plan.preferences, self._kept_reference)

    def _make_network(self) -> Network:
        plan, checkpoint = self._plan, self._checkpoint
        is_full = plan.algorithm == "full"
        stored = torch.float32 if is_full or checkpoint.rounding is not None else checkpoint.dtype
        # What is sharded goes to its device unit by unit: no GPU has to hold all of it.
        device = self._ranks.device if self._ranks.mesh is None else "cpu"
        llama = load_model(checkpoint, device=device, dtype=stored)
        network = Network(llama, new_score(llama, plan.seed) if plan.kind == "reward" else None)
        if is_full:
            keep_trained_in_float32(network)
        else:
            freeze(network, is_rounded=plan.algorithm == "qlora")
            begun = None
            if plan.adapter is not None:
                begun = load_adapter(plan.adapter, checkpoint.config)
                self._adapter_settings = AdapterSettings(
                    rank=begun.rank, alpha=begun.scale * begun.rank, is_merged=plan.adapter_settings.is_merged
                )
            add_adapters(
                network, self._adapter_settings, plan.seed, has_magnitude=plan.algorithm == "dora", begun=begun
            )
        network.is_checkpointing = plan.training.is_checkpointing_activations
        shard(network, self._ranks, plan.training)
        return network

    # One iteration

    def _iterate(self, rows: Sequence[int], rate: float) -> tuple[Measured, float, int]:
        groups = [self._encode(self._train, row) for row in rows]
        weight = self._objective.weight(groups)
        loss = correct = 0.0
        for part, part_rows, is_own in self._portions(groups, rows):
            # FSDP takes the mean of the ranks' gradients; what is wanted is their sum.
            share = self._ranks.count / weight if is_own else 0.0
            with products_in(self._dtype, self._ranks.device):
                outcome = self._objective.outcome(self.network, pack(part, self._ranks.device), part_rows)
            (outcome.loss * share).backward()  # type: ignore[no-untyped-call]
            if is_own:
                loss += float(outcome.loss.detach())
                correct += 0.0 if outcome.correct is None else float(outcome.correct)
        norm = self._clip()
        loss, correct = self._ranks.sums([loss, correct])
        if not math.isfinite(loss + norm):
            raise DivergedError(
                f"loss {loss / weight:g} and gradient {norm:g} in iteration {self._iters + 1}: the training has come "
                "apart; try a smaller lr"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        tokens = sum(len(sample.tokens) for group in groups for sample in group)
        return self._measured(loss, correct, weight, len(rows)), norm, tokens

    def _clip(self) -> float:
        limit = self._plan.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(self.network.trained.values(), limit or math.inf)
        return float(whole(norm))

    def _portions(
        self, groups: Sequence[Sequence[Sample]], rows: Sequence[int]
    ) -> Iterator[tuple[list[Sample], list[int], bool]]:
        """This rank's portions, and whether each counts: all ranks go through the network equally often."""
        made = list(portions(groups, rows, self._plan.training.micro_tokens))
        for first in range(0, len(made), self._ranks.count):
            own = first + self._ranks.number
            part, part_rows = made[own if own < len(made) else 0]
            yield part, part_rows, own < len(made)

    def _measured(self, loss: float, correct: float, weight: int, rows: int) -> Measured:
        return Measured(loss / weight, correct / rows if self._objective.has_accuracy else None)

    def _encode(self, rows: Rows, number: int) -> tuple[Sample, ...]:
        cut = self._encoder.cut
        try:
            samples = self._objective.encode(rows[number])
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{rows.name}, row {number + 1}: {error}") from None
        if not cut and self._encoder.cut:
            self._progress.tell(
                Note,
                text=f"{rows.name}, row {number + 1} is longer than a sequence may be: such rows are cut at their end",
            )
        return samples

    @torch.no_grad()
    def _validate(self) -> None:
        if self._validation is None or not len(self._validation):
            return
        self.network.train(False)
        size = self._plan.training.batch_size
        loss = correct = weight = 0.0
        for first in range(0, len(self._validation), size):
            rows = range(first, min(first + size, len(self._validation)))
            groups = [self._encode(self._validation, row) for row in rows]
            weight += self._objective.weight(groups)
            # Rows of the validation come after those of the training in what is kept of each.
            numbers = [len(self._train) + row for row in rows]
            for part, part_rows, is_own in self._portions(groups, numbers):
                with products_in(self._dtype, self._ranks.device):
                    outcome = self._objective.outcome(self.network, pack(part, self._ranks.device), part_rows)
                if is_own:
                    loss += float(outcome.loss)
                    correct += 0.0 if outcome.correct is None else float(outcome.correct)
        self.network.train(True)
        loss, correct = self._ranks.sums([loss, correct])
        self.validation = self._measured(loss, correct, int(weight), len(self._validation))
        self._progress.tell(Validation, iters=self._iters, loss=self.validation.loss, accuracy=self.validation.accuracy)

    # What preferences are compared with

    def _kept_reference(self, rows: Sequence[int]) -> Tensor:
        assert self._reference is not None
        return self._reference[torch.tensor(rows)]

    @torch.no_grad()
    def _keep_reference(self) -> None:
        """Keep what the weights that training begins with make of all rows that it will see.

        So no second network is held, and no row goes through one twice. A training that goes on reads what is kept.
        """
        if self._plan.kind != "dpo":
            return
        file = self._job / REFERENCE_FILE
        total = len(self._train) + (len(self._validation) if self._validation is not None else 0)
        if self._iters:  # the weights are no longer those that it is about
            self._reference = read_tensor(file, "log_probs", (total, 2))
            return
        first_epoch = range(min(self.total_iters, self._schedule.epoch_iters))
        needed = sorted({row for iteration in first_epoch for row in self._schedule.batch(iteration)})
        needed += range(len(self._train), total)
        kept = torch.zeros(total, 2)
        size = self._plan.training.batch_size
        for first in range(0, len(needed), size):
            rows = needed[first : first + size]
            groups = [self._row_of_either(row) for row in rows]
            for part, part_rows, is_own in self._portions(groups, rows):
                with products_in(self._dtype, self._ranks.device):
                    logs = self.network(pack(part, self._ranks.device), "log_probs").view(-1, 2).cpu()
                if is_own:
                    kept[torch.tensor(part_rows)] = logs
        if self._ranks.count > 1:
            kept = kept.to(self._ranks.device)
            torch.distributed.all_reduce(kept)
        self._reference = kept.cpu()
        if self._ranks.is_first:
            aside = file.with_suffix(".part")
            save_file({"log_probs": self._reference}, aside)
            settle(aside, file)

    def _row_of_either(self, row: int) -> tuple[Sample, ...]:
        if row < len(self._train):
            return self._encode(self._train, row)
        assert self._validation is not None
        return self._encode(self._validation, row - len(self._train))

    # Beginning, going on, ending

    def _start(self, resumed: Path | None) -> None:
        device = str(self._ranks.device)
        if self._ranks.device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self._ranks.device)})"
        self._progress.tell(
            Started,
            iters=self._iters,
            total_iters=self.total_iters,
            device=device,
            precision=str(self._dtype).removeprefix("torch."),
            world_size=self._ranks.count,
            trainable_parameters=sum(weight.numel() for weight in self.network.trained.values()),
            parameters=self._checkpoint.config.parameter_count,
            rows=len(self._train),
            resumed_from=None if resumed is None else resumed.name,
        )
        if resumed is None:
            sample = self._encode(self._train, self._schedule.batch(0)[0])[0]
            self._progress.tell(Shown, pieces=shown(sample, self._tokenizer))

    def _resume(self) -> Path | None:
        folder = newest_valid(
            self._job, lambda error: self._progress.tell(Note, text=f"a checkpoint is passed over: {error}")
        )
        if folder is not None:
            state = folder / STATE_FOLDER
            self._iters = restore(state, self.network.trained, self._optimizer, self._fingerprint, self.total_iters)
            self._saved = self._iters
        return folder

    def _save_checkpoint(self) -> None:
        trained = {name: whole(weight) for name, weight in self.network.trained.items()}
        state = whole_state(self.network.trained, self._optimizer)

        def fill(folder: Path) -> None:
            self._fill(folder, trained)
            write_state(folder / STATE_FOLDER, self._iters, self._fingerprint, trained, state)

        if self._ranks.is_first:
            save_checkpoint(self._job, self._iters, fill, self._plan.keep_checkpoints)
        self._ranks.meet()
        self._saved = self._iters
        self._progress.tell(
            CheckpointSaved, iters=self._iters, folder=f"{CHECKPOINTS_FOLDER}/{checkpoint_name(self._iters)}"
        )

    def _finish(self) -> None:
        trained = {name: whole(weight) for name, weight in self.network.trained.items()}
        if self._ranks.is_first:
            write_folder(self._job / RESULT_FOLDER, self._iters, lambda folder: self._fill(folder, trained))
        self._ranks.meet()
        self._progress.tell(Finished, iters=self._iters, folder=RESULT_FOLDER)

    def _fill(self, folder: Path, trained: dict[str, Tensor]) -> None:
        settings = self._adapter_settings
        if self._plan.algorithm == "full":
            export.save_whole(trained, self._checkpoint, self._tokenizer, folder)
        elif settings.is_merged or self._plan.kind == "reward":
            scale = settings.alpha / settings.rank
            export.save_merged(trained, scale, self._checkpoint, self._tokenizer, folder)
        else:
            export.save_adapter(trained, settings, self._plan.base, folder)

    @cached_property
    def _fingerprint(self) -> str:
        """Changes with whatever the losses depend on: the rows by their number and the file's size, not its text."""
        told = self._plan.model_dump(
            mode="json", exclude={"loggers", "device", "save_every", "keep_checkpoints", "validate_every"}
        )
        told["training"] = {key: value for key, value in told["training"].items() if key not in _NO_MATTER}
        told |= {"train": [len(self._train), self._plan.train.stat().st_size], "base": None, "adapter": None}
        told["validation"] = None
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


_NO_MATTER = {"is_checkpointing_activations", "is_wrapped_fsdp", "is_offloaded_fsdp", "micro_tokens"}


def finished_result(job: Path) -> int | None:
    """After how many iterations a job's result was written; None while there is no valid one."""
    try:
        return verify(job / RESULT_FOLDER)
    except (CheckpointError, OSError):
        return None


def _optimizer(plan: TrainingPlan, network: Network) -> torch.optim.Optimizer:
    trained = list(network.trained.values())
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": plan.optimizer.weight_decay},
        {"params": [weight for weight in trained if weight.ndim == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    made: torch.optim.Optimizer = kinds[plan.optimizer.kind](groups, lr=plan.optimizer.lr, fused=True)
    return made
