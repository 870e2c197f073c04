"""All cases: what the tiny model is trained on, and the held-out ones that it is measured on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Literal

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

Phase = Literal["drill", "wide", "plain"]
"""The course of training: copying, cases that are harder than those that are measured, and cases like those."""

SKILLS: tuple[Skill, ...] = ("chat", "passage", "tool_call", "tool_result", "guard", "recall", "unknown")
"""What is measured."""

_Makers = tuple[tuple[float, Callable[[Words], Case]], ...]
"""Functions that make cases, with the share of the cases that each makes."""


def _prose_case(words: Words) -> Case:
    return Case("prose", (), text=prose(words))


_MIXTURES: dict[Phase, _Makers] = {
    "drill": ((0.4, copy_case), (0.4, lookup_case), (0.2, recall_case)),
    "wide": (
        *((0.08, chat_case), (0.01, persona_case), (0.06, recall_case), (0.03, unknown_case), (0.02, copy_case)),
        *((0.03, lookup_case), (0.22, passage_case), (0.32, tool_case), (0.02, built_in_case), (0.18, guard_case)),
        (0.03, _prose_case),
    ),
    "plain": (
        *((0.09, chat_case), (0.01, persona_case), (0.03, recall_case), (0.03, unknown_case), (0.02, built_in_case)),
        *((0.32, passage_case), (0.30, tool_case), (0.18, guard_case), (0.02, _prose_case)),
    ),
}


def training_cases(seed: int, phase: Phase = "wide") -> Iterator[Case]:
    """Training cases without end, the same for the same seed and phase."""
    words = Words(random.Random(f"train {seed} {phase == 'drill'}"), "train", is_wide=phase == "wide")
    shares, makers = zip(*_MIXTURES[phase], strict=True)
    while True:
        yield words.random.choices(makers, shares)[0](words)


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
