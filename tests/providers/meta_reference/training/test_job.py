"""A job in a process of its own: signals, kills, locks, and what it says when it fails."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_stack_meta_reference.training.job import run_job
from llama_stack_meta_reference.training.plan import (
    EXIT_BUSY,
    EXIT_DONE,
    EXIT_FAILED,
    Failed,
    Finished,
    Started,
    Step,
    Stopped,
)

from tests.providers.meta_reference.training.jobs import events, losses, make_job, preferences, write_rows

LONG = {"n_epochs": 0, "n_iters": 40, "batch_size": 2}
KILLS = int(os.environ.get("LLAMA_STACK_KILLS", "2"))


def start(job: Path, command: Sequence[str] = ("-m", "llama_stack_meta_reference.training")) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, *command, str(job)], env=environment)


def wait_for_steps(job: Path, more: int, process: subprocess.Popen[bytes]) -> None:
    before = len(events(job, Step))
    while len(events(job, Step)) < before + more and process.poll() is None:
        time.sleep(0.005)


def test_sigterm_saves_what_was_done_and_the_next_process_goes_on(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Nothing is lost between the two, and nothing done twice."""
    job = make_job(tmp_path / "job", worded_checkpoint, training=LONG, save_every=0)
    process = start(job)
    wait_for_steps(job, 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_DONE
    (stopped,) = events(job, Stopped)
    assert run_job(job) == EXIT_DONE
    assert events(job, Started)[-1].iters == stopped.iters
    assert [event.iters for event in events(job, Step)] == list(range(1, 41))
    whole = make_job(tmp_path / "whole", worded_checkpoint, training=LONG)
    assert run_job(whole) == EXIT_DONE
    assert losses(job) == pytest.approx(losses(whole), abs=1e-5)


def test_a_killed_training_completes_along_the_same_losses(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Killed at random moments, of which saves are many: each iteration is a checkpoint."""
    settings: dict[str, Any] = {"training": LONG, "save_every": 1, "kind": "dpo", "algorithm": "full"}
    whole = make_job(tmp_path / "whole", worded_checkpoint, **settings)
    assert run_job(whole) == EXIT_DONE
    job = make_job(tmp_path / "job", worded_checkpoint, **settings)
    draw = random.Random(1)
    for _ in range(KILLS):
        process = start(job)
        wait_for_steps(job, 2, process)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.wait(60)
    assert run_job(job) == EXIT_DONE
    assert losses(job) == pytest.approx(losses(whole), abs=1e-5)
    assert events(job, Finished)[-1].iters == 40


def test_a_job_that_is_done_says_so_again(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Whoever started it may have missed the end."""
    job = make_job(tmp_path / "job", worded_checkpoint, training={"n_iters": 1})
    assert run_job(job) == EXIT_DONE
    assert run_job(job) == EXIT_DONE
    assert len(events(job, Finished)) == 2
    assert len(events(job, Step)) == 1


def test_two_processes_never_work_in_one_folder(worded_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", worded_checkpoint)
    with (job / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_job(job) == EXIT_BUSY
    assert not (job / "progress.jsonl").exists()
    assert run_job(job) == EXIT_DONE


@pytest.mark.parametrize(
    ("plan", "code", "cause"),
    [
        ("{", "validation", "plan.json"),
        ('{"kind": "sft"}', "validation", "plan.json: base"),
        ('{"kind": "sft", "base": "nowhere"}', "checkpoint_invalid", "no such folder"),
        (None, "setup", "plan.json cannot be read"),
    ],
)
def test_a_failure_is_told_with_its_reason(plan: str | None, code: str, cause: str, tmp_path: Path) -> None:
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan)
    write_rows(tmp_path / "train.jsonl", preferences(1))
    assert run_job(tmp_path) == EXIT_FAILED
    (failed,) = events(tmp_path, Failed)
    assert failed.code == code
    assert cause in failed.reason


def test_a_line_that_a_crash_cut_off_spoils_no_other(worded_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", worded_checkpoint, training={"n_iters": 1})
    (job / "progress.jsonl").write_text('{"event": "st')
    assert run_job(job) == EXIT_DONE
    assert len(events(job, Step)) == 1
