"""Jobs outlive the end of everything: kill -9 of trainers, in the middle of saves, and of servers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from llama_stack_meta_reference.post_training.jobs import folder_name

from llama_stack.apis.post_training import JobStatus
from llama_stack.client import Client
from tests.providers.meta_reference.post_training.stage import END_SECONDS, distribution, losses, sft

KILLS = int(os.environ.get("LLAMA_STACK_KILLS", "4"))
"""Half of them of the trainer at a random moment, a quarter of it in a save, a quarter of the server; 40 when asked."""
JOB = {"n_iters": 12 + 3 * KILLS, "batch_size": 2}
ROOT = Path(__file__).parents[4]


def wait_until(condition: Callable[[], Any]) -> Any:
    """What the condition gives once it gives something; END_SECONDS is a bound, not a figure."""
    ends = time.monotonic() + END_SECONDS
    while not (found := condition()):
        assert time.monotonic() < ends, "it does not come to that"
        time.sleep(0.002)
    return found


def trainers(folder: Path) -> list[int]:
    """The processes that train in a folder, which a zombie does no more."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_one = str(folder).encode() in path.read_bytes().split(b"\0")
        except OSError:
            continue
        if is_one:
            found.append(int(path.parent.name))
    return found


def goes_on(folder: Path, told: int) -> bool:
    """Whether a trainer runs that has told of more iterations than that."""
    return len(losses(folder)) > told and bool(trainers(folder))


class Server:
    """A server without inference, and a client of it."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        described = distribution(folder, checkpoint, save_every=1, max_attempts=10, models={"base": str(checkpoint)})
        del described["providers"]["inference"]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.providers.meta_reference.post_training.served",
                str(folder),
                json.dumps(described),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        address = self.process.stdout.readline().strip()
        assert address.startswith("http"), "it ended"
        self.client = Client(address)

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def served(folder: Path, checkpoint: Path) -> Iterator[list[Server]]:
    """A list with one server, which a test may replace."""
    servers = [Server(folder, checkpoint)]
    try:
        yield servers
    finally:
        servers[0].close()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_killed_jobs_complete_along_the_same_losses(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Whatever is killed when: the job completes, its losses are those of a job that nobody disturbed, none is lost."""
    chance = random.Random(6)
    with served(tmp_path, worded_checkpoint) as servers:
        jobs = servers[0].client.post_training
        for name in ("whole", "broken"):
            jobs.supervised_fine_tune(sft(tmp_path, name, model="base", training_config=JOB))
        whole, broken = (
            next((tmp_path / "state" / "folders").iterdir()) / folder_name(name) for name in ("whole", "broken")
        )
        wait_until(lambda: jobs.job_status("whole").completed_at)

        moments = ["anywhere"] * (KILLS // 2) + ["save"] * (KILLS // 4) + ["server"] * (KILLS // 4)
        chance.shuffle(moments)
        for moment in moments:
            told = len(losses(broken))
            wait_until(partial(goes_on, broken, told))
            time.sleep(chance.uniform(0, 0.05))  # somewhere within an iteration: the moment is the point
            if moment == "server":
                servers[0].process.kill()
                servers[0].close()
                wait_until(lambda: not trainers(broken))  # nobody trains on without a server
                servers[0] = Server(tmp_path, worded_checkpoint)
                jobs = servers[0].client.post_training
                continue
            if moment == "save":
                wait_until(lambda: [*(broken / "checkpoints").glob("*.part")])
            for pid in trainers(broken):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: jobs.job_status("broken").completed_at)
        assert jobs.job_status("broken").status is JobStatus.COMPLETED
        assert losses(broken) == pytest.approx(losses(whole), abs=1e-5)
        assert len(losses(whole)) == JOB["n_iters"]
        assert {job.job_uuid: job.status for job in jobs.list_jobs()} == dict.fromkeys(
            ("whole", "broken"), JobStatus.COMPLETED
        )
        assert not trainers(broken)
