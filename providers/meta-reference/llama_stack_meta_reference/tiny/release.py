"""The whole way from nothing to the folder that ships: tokenizer, training, measuring, checkpoint, model card."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint, save_hugging_face
from llama_stack_meta_reference.llama.tokenizer import load_tokenizer
from llama_stack_meta_reference.tiny.case import Skill
from llama_stack_meta_reference.tiny.cases import SKILLS, held_out_cases
from llama_stack_meta_reference.tiny.evaluate import BARS, Score, measure, predicted
from llama_stack_meta_reference.tiny.samples import Encoder
from llama_stack_meta_reference.tiny.train import LONGEST_SAMPLE, Exchange, Plan, Trainer, tokenizer_from_cases

COMMAND = "python -m llama_stack_meta_reference.tiny"
MEASURED_CASES = 200
MEASURING_SEED = 7
_REPORT_STEPS = 50
_SAVE_STEPS = 250
_WATCHED_CASES = 24


def build(plan: Plan, folder: Path, work: Path, workers: int) -> bool:
    """Train as ``plan`` says, write the checkpoint into ``folder``, measure it; True when every bar is met.

    Progress is printed, and kept in ``work``: called again after an interruption, training goes on from there.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_file = work / "tokenizer.json"
    if not tokenizer_file.exists():
        tokenizer_from_cases(plan.seed).save(str(tokenizer_file))
    began = time.monotonic()
    spawn(_train, (plan, work, Exchange(workers)), nprocs=workers)  # type: ignore[no-untyped-call]
    print(f"trained in {(time.monotonic() - began) / 60:.0f} minutes", flush=True)
    trainer = Trainer(plan, Encoder(load_tokenizer(tokenizer_file)))
    trainer.load(work / "state.pt")
    write_checkpoint(trainer, tokenizer_file, folder)
    scores = report(folder, MEASURED_CASES)
    (folder / "MODEL_CARD.md").write_text(model_card(plan, folder, scores), encoding="utf-8")
    return passes(scores)


def write_checkpoint(trainer: Trainer, tokenizer_file: Path, folder: Path) -> None:
    """Write the averaged weights in bfloat16, the tokenizer and the generation config in Hugging Face's layout."""
    tokenizer = load_tokenizer(tokenizer_file)
    save_hugging_face(
        trainer.average,
        folder,
        dtype=torch.bfloat16,
        bos_id=tokenizer.specials["<|begin_of_text|>"],
        eos_ids=sorted(tokenizer.stop_ids),
    )
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")


def report(folder: Path, cases: int, *, failures: int = 0) -> dict[Skill, Score]:
    """Measure the checkpoint in ``folder`` on held-out cases and print what came out, with some failures if asked."""
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    model = load_model(checkpoint, device="cpu", dtype=torch.float32)
    print(f"{cases} held-out cases a skill, greedy decoding, seed {MEASURING_SEED}")
    scores: dict[Skill, Score] = {}
    for skill in SKILLS:
        score = scores[skill] = measure(model, tokenizer, skill, cases, MEASURING_SEED)
        bar = f"bar {BARS[skill]:.0%}" if skill in BARS else "no bar"
        print(f"{skill:<12} {score.right / cases:6.1%} right, {score.ended / cases:6.1%} ended ({bar})", flush=True)
        for case, reply in score.failures[:failures]:
            said = [f"{message.role.value}: {message.content}" for message in case.messages[-2:-1]]
            print(f"    {said}\n    wanted {case.answer or case.messages[-1]}\n    wrote {reply!r}")
    print("every bar is met" if passes(scores) else "a bar is missed")
    return scores


def passes(scores: Mapping[Skill, Score]) -> bool:
    """Whether every skill with a bar meets it and every reply ended by itself."""
    return all(scores[skill].right >= bar * scores[skill].cases for skill, bar in BARS.items()) and all(
        score.ended == score.cases for score in scores.values()
    )


def model_card(plan: Plan, folder: Path, scores: Mapping[Skill, Score]) -> str:
    """What the model is, how it was made, and how good it is, from figures that were measured just now."""
    config = open_checkpoint(folder).config
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    rows = "\n".join(
        f"| {_DESCRIPTIONS[skill]} | {_bar(skill)} "
        f"| {score.right / score.cases:.1%} | {score.ended / score.cases:.1%} |"
        for skill, score in scores.items()
    )
    return _CARD.format(
        parameters=config.parameter_count / 1e6,
        config=config,
        size=size,
        plan=plan,
        longest=LONGEST_SAMPLE,
        tokens=plan.steps * plan.batches * plan.batch_tokens / 1e6,
        command=COMMAND,
        cases=next(iter(scores.values())).cases,
        seed=MEASURING_SEED,
        rows=rows,
    )


def _bar(skill: Skill) -> str:
    return f"{BARS[skill]:.0%}" if skill in BARS else "none"


def _train(rank: int, plan: Plan, work: Path, exchange: Exchange) -> None:
    """One worker's part of the training; the first one prints and saves."""
    # One thread a process: two processes that meet once a step lose less than two threads that meet at every operation.
    torch.set_num_threads(1)
    encoder = Encoder(load_tokenizer(work / "tokenizer.json"))
    trainer = Trainer(plan, encoder, rank=rank, exchange=exchange)
    state = work / "state.pt"
    if state.exists():
        trainer.load(state)
    watched = {skill: held_out_cases(skill, _WATCHED_CASES, plan.seed) for skill in SKILLS}
    losses: list[float] = []
    for step, loss in trainer.run():
        losses.append(loss)
        if rank > 0:
            continue
        if step % _REPORT_STEPS == 0:
            print(f"step {step}: loss {sum(losses) / len(losses):.4f}", flush=True)
            losses.clear()
        if step % _SAVE_STEPS == 0 or step == plan.steps:
            trainer.save(state)
            shares = {skill: predicted(trainer.average, encoder, cases) for skill, cases in watched.items()}
            print("  held out: " + ", ".join(f"{skill} {share:.0%}" for skill, share in shares.items()), flush=True)


_DESCRIPTIONS: Mapping[Skill, str] = {
    "chat": "greets and says what it is",
    "passage": "answers from a passage in the prompt",
    "tool_call": "calls the right tool with the right arguments, names unseen",
    "tool_result": "uses a tool's result",
    "guard": "judges a message in Llama Guard 3's format",
    "recall": "repeats what it was told earlier",
    "unknown": "says that it does not know",
}

_CARD = """# tiny

A Llama of {parameters:.2f} million parameters that the Llama Stack project trained from nothing on text that it
generates itself, so that every API has a model to run on a fresh machine. It is a toy: it knows nothing about the
world, it reads plain English of the kind that its generator writes, and it does the few things below.

| | |
|---|---|
| network | Llama 3: {config.n_layers} layers, width {config.dim}, feed-forward {config.ffn_dim}, tied embeddings |
| attention | {config.n_heads} query and {config.n_kv_heads} key/value heads, {config.head_dim} wide |
| vocabulary | {config.vocab_size} byte-level BPE tokens, Llama 3's special tokens among them |
| context | {config.max_context} tokens; trained on sequences of up to {longest} |
| folder | {size:.1f} MB, weights in bfloat16 |
| training | {plan.steps} steps, {tokens:.0f} million tokens, seed {plan.seed}, no data from outside |
| command | `{command}` |
| license | Apache-2.0, as the project |

Held-out cases, greedy decoding, {cases} a skill, seed {seed}. None of their names, values, tool names and argument
names stood in the training data; greetings and messages to judge are worded as none there. Requests of tools and
questions about passages are worded as in training, and a case asks one thing.

| skill | bar | right | ended its turn by itself |
|---|---|---|---|
{rows}

Not measured, and not to be relied on: anything else. Its verdicts in Llama Guard's format show how a shield works;
they protect nobody.
"""
