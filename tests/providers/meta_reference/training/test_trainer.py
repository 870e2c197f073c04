"""The loop: where it ends, what it leaves, and that being cut off changes none of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint
from llama_stack_meta_reference.llama.lora import load_adapter
from llama_stack_meta_reference.training.plan import (
    CheckpointSaved,
    Finished,
    Note,
    OptimizerSettings,
    Shown,
    Started,
    Step,
    Stopped,
    TrainingSettings,
    Validation,
)
from llama_stack_meta_reference.training.schedule import Schedule, learning_rate
from llama_stack_meta_reference.training.store import checkpoints, verify

from llama_stack.errors import CheckpointError, InvalidRequestError
from tests.providers.meta_reference.training.jobs import dialogs, events, losses, make_job, message, train, write_rows


def stop_after(iterations: int) -> Callable[[], bool]:
    asked = count()
    return lambda: next(asked) >= iterations


@pytest.mark.parametrize("settings", [
    {"kind": "sft", "algorithm": "full"},
    {"kind": "sft", "algorithm": "lora"},
    {"kind": "sft", "algorithm": "full", "optimizer": {"kind": "sgd", "lr": 0.1}},
    {"kind": "sft", "algorithm": "lora", "optimizer": {"kind": "adam", "lr": 0.01, "weight_decay": 0.1}},
    {"kind": "dpo", "algorithm": "lora"},
], ids=lambda settings: "-".join(str(value) for value in settings.values() if isinstance(value, str)))  # fmt: skip
def test_a_training_that_was_cut_off_goes_on_along_the_same_losses(
    settings: dict[str, Any], worded_checkpoint: Path, tmp_path: Path
) -> None:
    """Stopped twice, in the middle of an epoch and at its end: the curve is the unbroken one's to the last digit."""
    whole = make_job(tmp_path / "whole", worded_checkpoint, **settings)
    train(whole)
    broken = make_job(tmp_path / "broken", worded_checkpoint, **settings)
    train(broken, stop_after(2))
    assert [event.iters for event in events(broken, Stopped)] == [2]
    train(broken, stop_after(1))
    train(broken)
    assert [event.resumed_from for event in events(broken, Started)] == [None, "iters-00000002", "iters-00000003"]
    assert losses(broken) == pytest.approx(losses(whole), abs=1e-7)
    assert len(losses(whole)) == 6
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (whole / "result" / name).exists():
            assert (whole / "result" / name).read_bytes() == (broken / "result" / name).read_bytes()


def test_a_damaged_checkpoint_is_passed_over_and_told_of(worded_checkpoint: Path, tmp_path: Path) -> None:
    """The one before it does; the losses are those of the unbroken run all the same."""
    job = make_job(tmp_path / "job", worded_checkpoint, save_every=1)
    train(job)
    expected = losses(job)
    shutil.rmtree(job / "result")
    newest = checkpoints(job)[-1]
    weights = newest / "trainer" / "weights.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    (job / "progress.jsonl").unlink()
    train(job)
    assert "damaged" in events(job, Note)[0].text
    assert events(job, Started)[0].resumed_from == "iters-00000005"
    assert losses(job) == {6: expected[6]}


def test_settings_that_changed_are_refused_and_not_quietly_followed(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Another number of epochs is another learning rate at every step: the curve would have a kink."""
    job = make_job(tmp_path / "job", worded_checkpoint)
    train(job, stop_after(2))
    make_job(job, worded_checkpoint, training={"n_epochs": 3, "batch_size": 4})
    with pytest.raises(InvalidRequestError, match="another plan"):
        train(job)
    make_job(job, worded_checkpoint, save_every=1)
    train(job)


def test_old_checkpoints_go_and_the_last_stays(worded_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", worded_checkpoint, save_every=1, keep_checkpoints=2)
    train(job)
    assert [path.name for path in checkpoints(job)] == ["iters-00000005", "iters-00000006"]
    assert [event.iters for event in events(job, CheckpointSaved)] == [1, 2, 3, 4, 5, 6]
    assert verify(job / "result") == 6


def test_a_result_is_what_inference_reads(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Whole models with their tokenizer and the ends of a turn; adapters that fit the base."""
    whole = make_job(tmp_path / "whole", worded_checkpoint, algorithm="full")
    train(whole)
    opened = open_checkpoint(whole / "result")
    assert opened.tokenizer_file is not None
    assert len(opened.eos_ids) == 4, "the base's own end, and those of a text, a message and a turn"
    load_model(opened, device="cpu", dtype=opened.dtype)
    adapted = make_job(tmp_path / "adapted", worded_checkpoint, algorithm="lora")
    train(adapted)
    assert len(load_adapter(adapted / "result", opened.config).pairs) == 14


def test_progress_says_where_a_training_stands(worded_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", worded_checkpoint, validation="validation.jsonl", validate_every=2)
    write_rows(job / "validation.jsonl", dialogs(5))
    train(job)
    (started,) = events(job, Started)
    assert (started.total_iters, started.rows, started.world_size) == (6, 10, 1)
    assert started.trainable_parameters == 2 * 8 * (4 * 64 + 64 + 2 * 16 + 64 + 3 * (64 + 128))
    assert any(is_learnt for _, is_learnt in events(job, Shown)[0].pieces)
    steps = events(job, Step)
    assert steps[-1].seconds_left == 0
    assert steps[0].tokens_per_second > 0
    assert [event.iters for event in events(job, Validation)] == [2, 4, 6]
    assert events(job, Validation)[-1].loss < events(job, Validation)[0].loss
    assert events(job, Finished)[0].folder == "result"


@pytest.mark.parametrize(("n_epochs", "n_iters", "total"), [(2, 0, 6), (0, 4, 4), (2, 4, 4), (1, 4, 3)])
def test_the_first_limit_reached_ends_it(n_epochs: int, n_iters: int, total: int) -> None:
    settings = TrainingSettings(n_epochs=n_epochs, n_iters=n_iters, batch_size=4)
    assert Schedule(10, settings, 0).total_iters == total


def test_each_epoch_has_every_row_once_in_an_order_that_the_seed_settles() -> None:
    def order(seed: int, epoch: int, is_shuffled: bool = True) -> list[int]:
        schedule = Schedule(10, TrainingSettings(batch_size=4, is_shuffled=is_shuffled), seed)
        return [row for i in range(3) for row in schedule.batch(3 * epoch + i)]

    assert sorted(order(1, 0)) == list(range(10))
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 3, is_shuffled=False) == list(range(10))


def test_the_rate_climbs_and_then_falls_to_its_minimum() -> None:
    settings = OptimizerSettings(lr=1.0, lr_min=0.1, warmup_iters=4)
    rates = [learning_rate(settings, i, 104) for i in range(104)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 < rates[-1] < 0.101


@pytest.mark.parametrize("micro_tokens", [1, 60])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_portions_and_recomputed_activations_change_no_loss(
    kind: str, micro_tokens: int, worded_checkpoint: Path, tmp_path: Path
) -> None:
    """They are about memory; the loss is a mean over the batch's labels, not over its portions' means."""
    plain = make_job(tmp_path / "plain", worded_checkpoint, kind=kind)
    train(plain)
    training = {"n_epochs": 2, "batch_size": 4, "micro_tokens": micro_tokens, "is_checkpointing_activations": True}
    frugal = make_job(tmp_path / "frugal", worded_checkpoint, kind=kind, training=training)
    train(frugal)
    assert losses(frugal) == pytest.approx(losses(plain), abs=2e-5)


def test_a_faulty_row_is_named_and_ends_the_training(worded_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", worded_checkpoint, rows=[*dialogs(2), {"dialog": [message("user", "?")]}])
    with pytest.raises(InvalidRequestError, match=r"train.jsonl, row 3: dialog: there is no message of the assistant"):
        train(job)


def test_rows_that_are_too_long_are_cut_and_told_of(worded_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"dialog": [message("user", "Hello"), message("assistant", "mat " * 500)]}]
    job = make_job(tmp_path / "job", worded_checkpoint, rows=rows)
    train(job)
    assert "row 1 is longer" in events(job, Note)[0].text
    assert math.isfinite(losses(job)[1])


def test_a_loss_that_is_no_number_ends_the_training(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Going on would only spoil checkpoints."""
    job = make_job(
        tmp_path / "job", worded_checkpoint, algorithm="full", training={"n_epochs": 0, "n_iters": 50},
        optimizer={"kind": "sgd", "lr": 100.0, "weight_decay": 100.0, "warmup_iters": 0},
    )  # fmt: skip
    with pytest.raises(InvalidRequestError, match="smaller lr"):
        train(job)


def test_no_rows_are_refused(worded_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no rows"):
        train(make_job(tmp_path / "job", worded_checkpoint, rows=[]))


def test_a_base_without_a_tokenizer_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        train(make_job(tmp_path / "job", small_checkpoint))
