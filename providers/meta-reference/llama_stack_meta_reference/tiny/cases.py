"""All cases: what the tiny model is trained on, and the held-out ones that it is measured on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from llama_stack_meta_reference.tiny.case import Case, Skill
from llama_stack_meta_reference.tiny.conversation import (
    chat_case,
    copy_case,
    lookup_case,
    persona_case,
    recall_case,
    unknown_case,
)
from llama_stack_meta_reference.tiny.guard import guard_case
from llama_stack_meta_reference.tiny.passages import passage_case, prose
from llama_stack_meta_reference.tiny.tool_use import built_in_case, tool_case
from llama_stack_meta_reference.tiny.words import Words

SKILLS: tuple[Skill, ...] = ("chat", "passage", "tool_call", "tool_result", "guard", "recall", "unknown")
"""What is measured."""

_MIXTURE: tuple[tuple[float, Callable[[Words], Case]], ...] = (
    (0.07, chat_case),
    (0.01, persona_case),
    (0.08, recall_case),
    (0.03, unknown_case),
    (0.04, copy_case),
    (0.05, lookup_case),
    (0.25, passage_case),
    (0.24, tool_case),
    (0.02, built_in_case),
    (0.17, guard_case),
    (0.04, lambda words: Case("prose", (), text=prose(words))),
)

_DRILL: tuple[tuple[float, Callable[[Words], Case]], ...] = (
    (0.4, copy_case),
    (0.4, lookup_case),
    (0.2, recall_case),
)


def training_cases(seed: int, *, drill: bool = False) -> Iterator[Case]:
    """Training cases without end, the same for the same seed; ``drill`` gives the copying tasks that come first."""
    words = Words(random.Random(f"train {seed} {drill}"), "train")
    makers = _DRILL if drill else _MIXTURE
    shares, functions = [share for share, _ in makers], [maker for _, maker in makers]
    while True:
        yield words.random.choices(functions, shares)[0](words)


def held_out_cases(skill: Skill, count: int, seed: int) -> list[Case]:
    """``count`` cases of one skill that share neither names nor, where the skill has them, wordings with training."""
    words = Words(random.Random(f"held out {skill} {seed}"), "held_out")
    makers = {"chat": chat_case, "passage": passage_case, "tool_call": tool_case, "tool_result": tool_case}
    makers |= {"guard": guard_case, "recall": recall_case, "unknown": unknown_case, "copy": copy_case}
    cases: list[Case] = []
    while len(cases) < count:
        case = makers[skill](words)
        if case.skill == skill:
            cases.append(case)
    return cases
