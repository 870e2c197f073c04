"""A search: which settings are tried, which is kept, and that it goes on where it was cut off."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from llama_stack_meta_reference.training import search
from llama_stack_meta_reference.training.job import run_job
from llama_stack_meta_reference.training.plan import (
    EXIT_DONE,
    EXIT_FAILED,
    Failed,
    Finished,
    SearchSettings,
    TrainingPlan,
    Trial,
)
from llama_stack_meta_reference.training.search import combinations, trial_plan
from llama_stack_meta_reference.training.store import verify
from llama_stack_meta_reference.training.trainer import Trainer

from tests.providers.meta_reference.training.jobs import dialogs, events, make_job, write_rows


def searching(folder: Path, base: Path, **values: Any) -> Path:
    training = {"n_iters": 3, "batch_size": 4}
    job = make_job(folder, base, training=training, validation="validation.jsonl", search=values)
    write_rows(job / "validation.jsonl", dialogs(4))
    return job


def test_a_grid_is_all_combinations_and_a_draw_some_of_them() -> None:
    grid = SearchSettings(lr=(0.1, 0.2), rank=(4, 8, 16))
    made = combinations(grid, 0)
    assert made[:3] == [{"lr": 0.1, "rank": 4}, {"lr": 0.1, "rank": 8}, {"lr": 0.1, "rank": 16}]
    assert len(made) == 6
    drawn = combinations(grid.model_copy(update={"method": "random", "trials": 4}), 1)
    assert len({json.dumps(settings) for settings in drawn}) == 4
    assert all(settings in made for settings in drawn)
    assert drawn == combinations(grid.model_copy(update={"method": "random", "trials": 4}), 1)
    assert drawn != combinations(grid.model_copy(update={"method": "random", "trials": 4}), 2)


def test_a_trial_changes_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", tmp_path, optimizer={"lr": 0.01, "lr_min": 0.001})
    plan = TrainingPlan.load(job)
    made = trial_plan(plan, {"lr": 0.1, "rank": 2, "batch_size": 1})
    assert [made.optimizer.lr, made.optimizer.lr_min] == pytest.approx([0.1, 0.01])
    assert (made.adapter_settings.rank, made.training.batch_size) == (2, 1)
    assert trial_plan(plan, {}) == plan


def test_the_trial_of_the_least_validation_loss_is_kept(worded_checkpoint: Path, tmp_path: Path) -> None:
    """And one whose training comes apart has lost, where a mean or a sort would let NaN win."""
    job = searching(tmp_path / "job", worded_checkpoint, lr=[1e-6, 0.02])
    assert run_job(job) == EXIT_DONE
    trials = events(job, Trial)
    assert [(trial.number, trial.trials, trial.settings["lr"]) for trial in trials] == [(0, 2, 1e-6), (1, 2, 0.02)]
    first, second = (trial.validation_loss or math.inf for trial in trials)
    assert second < first
    kept = (job / "result" / "adapter_model.safetensors").read_bytes()
    assert kept == (job / "trials" / "001" / "result" / "adapter_model.safetensors").read_bytes()
    assert verify(job / "result") == events(job, Finished)[0].iters == 3


def test_a_search_goes_on_where_it_was(
    worded_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = searching(tmp_path / "job", worded_checkpoint, rank=[2, 4])
    assert run_job(job) == EXIT_DONE
    shutil.rmtree(job / "result")
    shutil.rmtree(job / "trials" / "001")
    begun: list[Path] = []

    class Noted(Trainer):
        def __init__(self, plan: TrainingPlan, folder: Path, *others: Any) -> None:
            begun.append(folder)
            super().__init__(plan, folder, *others)

    monkeypatch.setattr(search, "Trainer", Noted)
    assert run_job(job) == EXIT_DONE
    assert [folder.name for folder in begun] == ["001"]
    assert [trial.number for trial in events(job, Trial)] == [0, 1], "told twice"


def test_a_search_of_which_every_trial_comes_apart_has_failed(worded_checkpoint: Path, tmp_path: Path) -> None:
    job = searching(tmp_path / "job", worded_checkpoint, lr=[50.0, 100.0])
    values = json.loads((job / "plan.json").read_text())
    values |= {"algorithm": "full", "training": {"n_epochs": 0, "n_iters": 60}}
    values["optimizer"] = {"kind": "sgd", "weight_decay": 100.0, "warmup_iters": 0}
    (job / "plan.json").write_text(json.dumps(values))
    assert run_job(job) == EXIT_FAILED
    assert "every trial" in events(job, Failed)[0].reason
    assert [trial.validation_loss for trial in events(job, Trial)] == [None, None]
