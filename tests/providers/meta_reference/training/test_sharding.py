"""Several ranks under torchrun: what they compute together is what one process computes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_stack_meta_reference.llama.checkpoint import save_hugging_face
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.training.plan import Started
from safetensors.torch import load_file

from tests.providers.meta_reference import small_tokenizer
from tests.providers.meta_reference.small_llama import WORDED
from tests.providers.meta_reference.training.jobs import events, losses, make_job, train


def train_together(job: Path, ranks: int = 2) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*torchrun, "-m", "llama_stack_meta_reference.training", str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, (job / "progress.jsonl").read_text() + done.stderr.decode()[-3000:]


@pytest.fixture
def halved_checkpoint(tmp_path: Path) -> Path:
    """Stored in bfloat16: frozen weights stay so, beside adapters in float32."""
    model = Llama(WORDED, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0))
    folder = tmp_path / "halved"
    save_hugging_face(model, folder, dtype=torch.bfloat16, eos_ids=[7])
    small_tokenizer.write_hugging_face(folder)
    return folder


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("worded_checkpoint", {"algorithm": "full", "training": {"is_wrapped_fsdp": True, "is_offloaded_fsdp": True}}),
        ("halved_checkpoint", {"algorithm": "dora", "kind": "dpo"}),
        ("halved_checkpoint", {"algorithm": "qlora", "kind": "reward", "training": {"micro_tokens": 1}}),
    ],
    ids=["sft-full", "dpo-dora", "reward-qlora"],
)
def test_two_ranks_are_one_process(
    base: str, settings: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Six iterations of AdamW, two of which have rows for one rank only, and a validation."""
    checkpoint = request.getfixturevalue(base)
    training = {"n_epochs": 2, "batch_size": 4, "micro_tokens": 40, **settings.get("training", {})}
    asked = settings | {"training": training, "validation": "train.jsonl"}
    alone = make_job(tmp_path / "alone", checkpoint, **asked)
    train(alone)
    together = make_job(tmp_path / "together", checkpoint, **asked)
    train_together(together)
    assert events(together, Started)[0].world_size == 2
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    name = "adapter_model.safetensors" if settings.get("kind") == "dpo" else "model.safetensors"
    expected = load_file(alone / "result" / name)
    for key, weight in load_file(together / "result" / name).items():
        assert torch.allclose(weight.float(), expected[key].float(), atol=2e-4), key


def test_one_process_goes_on_from_what_two_saved(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Checkpoints hold whole tensors: a machine with another number of devices can take a job over."""
    whole = make_job(tmp_path / "whole", worded_checkpoint, algorithm="full")
    train(whole)
    broken = make_job(tmp_path / "broken", worded_checkpoint, algorithm="full", save_every=2)
    train_together(broken)
    for left in (broken / "result", broken / "checkpoints" / "iters-00000006"):
        left.rename(tmp_path / left.name)
    (broken / "progress.jsonl").unlink()
    train(broken)
    assert events(broken, Started)[0].resumed_from == "iters-00000004"
    assert losses(broken) == pytest.approx({i: loss for i, loss in losses(whole).items() if i > 4}, abs=1e-5)
