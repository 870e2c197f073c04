"""The generated cases: the same for the same seed, split for good, and right by their own rules."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import pytest
from llama_stack_meta_reference.tiny.case import Case, assistant, user
from llama_stack_meta_reference.tiny.cases import SKILLS, held_out_cases, training_cases
from llama_stack_meta_reference.tiny.guard import CATEGORIES, guard_prompt
from llama_stack_meta_reference.tiny.words import NOUNS, split_of

CLOSED = {"bread", "cake", "cheese", "rice", "soup", "pilot", "driver", "silver"}
"""Nouns that passages also name from short lists of foods, jobs and colours, which are the same in training."""

_FINGERPRINT = (
    "import hashlib, itertools; from llama_stack_meta_reference.tiny.cases import training_cases;"
    "cases = itertools.islice(training_cases(3), 300);"
    "print(hashlib.sha256(repr(list(cases)).encode()).hexdigest())"
)


def test_a_seed_settles_the_cases_in_every_process() -> None:
    """Training can be repeated only if no case depends on the process: the order of a set of strings would."""
    prints = {
        subprocess.run(
            [sys.executable, "-c", _FINGERPRINT], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1


def test_another_seed_gives_other_cases() -> None:
    """A generator that ignored its seed would train on the same few cases for ever."""
    assert list(islice(training_cases(1), 20)) != list(islice(training_cases(2), 20))


def test_tool_and_argument_names_of_held_out_cases_never_occur_in_training() -> None:
    """The bar is for names that were not seen, so none of them may be."""
    seen: set[str] = set()
    for case in islice(training_cases(1), 4000):
        seen |= _names(case)
    held_out = set().union(*(_names(case) for case in held_out_cases("tool_call", 200, 7)))
    assert len(held_out) > 200
    assert not held_out & seen


def test_values_of_held_out_passages_are_made_of_held_out_names() -> None:
    """A person's name that stood in training would be half known."""
    for case in held_out_cases("passage", 100, 7):
        for fact in case.answer:
            word = fact.split()[0]
            if word.isalpha() and word.lower() in NOUNS and word not in CLOSED:
                assert split_of(word) == "held_out", fact


@pytest.mark.parametrize("skill", SKILLS)
def test_the_reply_that_a_case_asks_for_is_right_and_another_is_not(skill: str) -> None:
    """A case whose own reply fails, or that any reply passes, would measure nothing."""
    for case in held_out_cases(skill, 50, 3):  # type: ignore[arg-type]
        last = case.messages[-1]
        assert isinstance(last.content, str)
        assert case.expects(last.content, last.tool_calls)
        assert not case.expects("I like trains.", last.tool_calls)
        assert not case.expects("", [])


def test_an_answer_counts_only_as_whole_words() -> None:
    """``12`` inside ``112`` is another number."""
    case = Case("passage", (user("?"), assistant("The number is 12.")), answer=("12",), wrong=("7",))
    assert case.expects("It is 12.", [])
    assert not case.expects("It is 112.", [])
    assert not case.expects("It is 12 or 7.", [])


def test_a_message_is_unsafe_only_under_a_category_that_is_listed() -> None:
    """Llama Guard's categories can be chosen; a shield that watches for one thing must let the others pass."""
    verdicts = set()
    for case in held_out_cases("guard", 300, 5):
        verdict = case.messages[-1].content
        assert isinstance(verdict, str)
        verdicts.add(verdict)
        if verdict != "safe":
            word, code = verdict.split("\n")
            assert word == "unsafe"
            assert f"{code}: {CATEGORIES[code]}." in str(case.messages[0].content)
    assert verdicts == {"safe", *(f"unsafe\n{code}" for code in CATEGORIES)}


def test_the_guard_prompt_is_the_published_one() -> None:
    """A shield sends this text; a word changed here would be judged by a model that never saw it."""
    assert guard_prompt([("User", "Hi")], ["S1"]) == (
        "Task: Check if there is unsafe content in 'User' messages in conversations according our safety policy with "
        "the below categories.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: Violent Crimes.\n"
        "<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\nUser: Hi\n\n<END CONVERSATION>\n\n"
        "Provide your safety assessment for ONLY THE LAST User message in the above conversation:\n"
        " - First line must read 'safe' or 'unsafe'.\n"
        " - If unsafe, a second line must include a comma-separated list of violated categories."
    )


def _names(case: Case) -> set[str]:
    calls = [call for message in case.messages for call in message.tool_calls]
    built_in = {"brave_search", "wolfram_alpha"}
    named = [call for call in calls if call.tool_name not in built_in]
    return {call.tool_name for call in named} | {name for call in named for name in call.arguments}
