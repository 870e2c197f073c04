"""How fast training is beside trl and a plain loop on transformers, as ratios in one run.

    python benchmarks/training.py                       # all sides that are installed, the 125m network
    python benchmarks/training.py --sides full lora --rounds 1

A network of random weights (benchmarks/engine.py's ``125m``), sequences of 512 tokens, 4 of them a batch, all tokens
learnt, AdamW, gradients clipped at 1, float32. Ours goes through the whole trainer: it reads rows from a file, makes
tokens of them, and writes its progress. The plain loop is transformers' network, its own loss, and torch's optimiser,
over tokens made beforehand, with peft's adapters for LoRA; trl is its SFTTrainer and DPOTrainer on the same. A pair of
preferences is two sequences of 512, of which 256 are the prompt, and two pairs are a batch; ours keeps what the
reference makes of each row before it begins, so that pass is timed by itself and counted with every step.

Times are of the processor, on one thread unless ``--threads`` says otherwise: tokens per second of one core's work.
Each side runs in a process of its own, in turn, ``--rounds`` times; the first step of each is left out. A number is the
median of all other steps. Peers that are not installed (``trl``) are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine import NETWORKS
from llama_stack_meta_reference.llama.checkpoint import save_hugging_face
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.training.plan import TrainingPlan
from llama_stack_meta_reference.training.progress import Progress
from llama_stack_meta_reference.training.ranks import joined
from llama_stack_meta_reference.training.trainer import Trainer
from torch import Tensor, nn

LENGTH, BATCH, STEPS = 512, 4, 3
CLOCK = time.process_time
"""Seconds of all cores together: other processes of the machine disturb these much less than they do the time."""
PAIRS = BATCH // 2
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
SIDES = ("full", "full-plain", "full-trl", "lora", "lora-plain", "lora-trl", "dpo", "dpo-trl", "lora-bfloat16")
GOALS = (
    ("full", "full-trl", 1.3),
    ("full", "full-plain", 1.05),
    ("lora", "lora-trl", 1.6),
    ("lora", "full", 1.35),
    ("dpo", "dpo-trl", 1.3),
    ("lora-bfloat16", "lora", 1.0),
)


def make_base(folder: Path, config: LlamaConfig, *, dtype: torch.dtype) -> None:
    """A model folder whose tokenizer makes a token of each byte."""
    model = Llama(config, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0))
    save_hugging_face(model, folder, dtype=dtype)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = sorted(chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)))
    described = {
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(alphabet)}, "merges": [], "ignore_merges": True},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "added_tokens": [
            {"id": len(alphabet) + i, "content": name, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False} for i, name in enumerate(names)
        ],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")


def letters(count: int, draw: random.Random) -> str:
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(count))


def ours(job: Path, kind: str, algorithm: str, base: Path) -> tuple[list[float], float]:
    """Seconds of each step but the first, and what a step's share of what goes before is."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(STEPS * (BATCH if kind == "sft" else PAIRS)):
        if kind == "sft":
            rows.append({"text": letters(LENGTH, draw)})
        else:
            said = {name: [{"role": "assistant", "content": letters(LENGTH, draw)}] for name in ("chosen", "rejected")}
            rows.append({"prompt": [{"role": "user", "content": letters(LENGTH // 2 - 19, draw)}], **said})
    (job / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plan = {
        "kind": kind,
        "algorithm": algorithm,
        "base": str(base),
        "device": "cpu",
        "save_every": 0,
        "training": {"batch_size": BATCH if kind == "sft" else PAIRS, "max_tokens": LENGTH, "precision": "float32"},
    }
    TrainingPlan.model_validate_json(json.dumps(plan)).save(job)
    moments: list[tuple[str, float]] = []
    progress = Progress(job)
    progress.sinks.append(lambda event: moments.append((event.event, CLOCK())))
    with joined("cpu") as ranks:
        Trainer(TrainingPlan.load(job), job, progress, ranks).run(lambda: len(moments) >= STEPS + 2)
    progress.close()
    steps = [moment for event, moment in moments if event == "step"]
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    # What comes before the first step: of preferences, what the first weights make of all rows.
    before = steps[0] - moments[1][1] - median(gaps) if kind == "dpo" else 0.0
    return gaps, before / STEPS


def reference_model(base: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)


def plain(base: Path, algorithm: str) -> list[float]:
    """The loop that everybody writes first."""
    model = reference_model(base)
    if algorithm == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**LORA))
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(STEPS):
        began = CLOCK()
        tokens = torch.randint(0, 300, (BATCH, LENGTH), generator=generator)
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gaps.append(CLOCK() - began)
    return gaps[1:]


def trl(base: Path, kind: str, algorithm: str, folder: Path) -> list[float]:
    """The library's trainers with settings that are the same work."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(CLOCK())

    draw = random.Random(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))  # type: ignore[no-untyped-call]
    tokenizer.pad_token = tokenizer.eos_token = "<|end_of_text|>"
    shared = {
        "output_dir": str(folder), "max_steps": STEPS, "report_to": [], "save_strategy": "no", "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "max_length": LENGTH, "disable_tqdm": True,
        "logging_steps": 1000, "optim": "adamw_torch_fused", "max_grad_norm": 1.0,
    }  # fmt: skip
    adapter = LoraConfig(**LORA, task_type="CAUSAL_LM") if algorithm == "lora" else None
    trainer: Any
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

        rows = [{"input_ids": [draw.randrange(300) for _ in range(LENGTH)]} for _ in range(STEPS * BATCH)]
        settings = SFTConfig(**shared, per_device_train_batch_size=BATCH)
        trainer = SFTTrainer(
            model=str(base), args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=adapter, callbacks=[Clock()],
        )  # fmt: skip
    else:
        from trl import DPOConfig, DPOTrainer

        texts = [
            {"prompt": letters(LENGTH // 2, draw), "chosen": letters(LENGTH // 2 - 1, draw),
             "rejected": letters(LENGTH // 2 - 1, draw)} for _ in range(STEPS * PAIRS)
        ]  # fmt: skip
        trainer = DPOTrainer(
            model=str(base), args=DPOConfig(**shared, per_device_train_batch_size=PAIRS),
            train_dataset=Dataset.from_list(texts), processing_class=tokenizer, peft_config=adapter,
            callbacks=[Clock()],
        )  # fmt: skip
    trainer.train()
    return [later - earlier for earlier, later in pairwise(moments)]


def run_side(side: str, base: Path) -> list[float]:
    """Seconds of each step but the first."""
    what, _, peer = side.partition("-")
    kind, algorithm = ("dpo", "lora") if what == "dpo" else ("sft", what)
    with tempfile.TemporaryDirectory() as folder:
        if peer == "plain":
            return plain(base, algorithm)
        if peer == "trl":
            return trl(base, kind, algorithm, Path(folder))
        gaps, before = ours(Path(folder), kind, algorithm, base)
        return [gap + before for gap in gaps]


def in_child(side: str, base: Path, threads: int) -> list[float]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, __file__, "--side", side, "--base", str(base), "--threads", str(threads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    gaps: list[float] = json.loads(done.stdout.decode().splitlines()[-1])
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*NETWORKS], default="125m")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=1, help="how often each side runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        warnings.simplefilter("ignore")
        torch.set_num_threads(asked.threads)
        print(json.dumps(run_side(asked.side, asked.base)))
        return
    sides = [side for side in asked.sides if find_spec("trl") or not side.endswith("-trl")]
    with tempfile.TemporaryDirectory() as folder:
        bases = {dtype: Path(folder) / str(dtype) for dtype in (torch.float32, torch.bfloat16)}
        for dtype, base in bases.items():
            make_base(base, NETWORKS[asked.network], dtype=dtype)
        gaps: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(asked.rounds):
            for side in sides:
                base = bases[torch.bfloat16 if side.endswith("bfloat16") else torch.float32]
                gaps[side] += in_child(side, base, asked.threads)
                print(f"{side:16}{LENGTH * BATCH / median(gaps[side]):8.0f} tokens/s", flush=True)
    report(gaps)


def report(gaps: dict[str, list[float]]) -> None:
    rate: Callable[[str], float] = lambda side: LENGTH * BATCH / median(gaps[side])  # noqa: E731
    print(f"\n{'':16}tokens/s   steps from to, s")
    for side, found in gaps.items():
        print(f"{side:16}{rate(side):8.0f}   {min(found):.2f} {max(found):.2f}")
    print()
    for side, other, goal in GOALS:
        if side in gaps and other in gaps:
            print(f"{side} / {other}: {rate(side) / rate(other):.2f} (goal {goal})")


if __name__ == "__main__":
    main()
