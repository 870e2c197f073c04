"""What a check is, the list of all of them, and how one is run.

A check is a coroutine function of a ``Subject`` that raises when a rule is broken: ``AssertionError`` with words for
the provider's author, or whatever the client raises for an answer that the contract does not allow. Its docstring is
the rule.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic
from typing import TYPE_CHECKING, Any

from ...apis import APIS, Api
from ...apis.contract import contract_of
from ...errors import NotProvidedError, StackError

if TYPE_CHECKING:
    from .subject import Subject

TIME_LIMIT_SECONDS = 120.0
"""How long a check may take; one that hangs is a failure and not the end of the run."""

Run = Callable[["Subject"], Awaitable[None]]


@dataclass(frozen=True)
class Check:
    """One rule, and how it is tried."""

    api: type[Api]
    name: str
    """``inference.batches_keep_their_order``: what a report and a test's id show."""
    rule: str
    """The rule in one sentence."""
    run: Run
    is_of_server: bool = False
    """Whether it tries the server in front of a provider rather than the provider."""


class Skipped(Exception):
    """A check has nothing to try: what it is about is not served, or cannot be done to this subject."""


class Verdict(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """A check that was run."""

    check: Check
    verdict: Verdict
    seconds: float
    reason: str = ""
    """Why it failed or was skipped."""


_BY_API: dict[type[Api], list[Check]] = {}


def check(api: type[Api]) -> Callable[[Run], Run]:
    """Make a coroutine function a check of an API; a plugin that brings an API adds its own in the same way."""

    def add(run: Run) -> Run:
        name = getattr(run, "__name__", "check")
        rule = " ".join((inspect.getdoc(run) or name).split("\n\n")[0].split())
        _BY_API.setdefault(contract_of(api), []).append(Check(api, f"{api.name}.{name}", rule, run))
        return run

    return add


def checks_for(api: type[Api], *, of_server: bool = False) -> list[Check]:
    """The checks of an API: those written for it, and those that follow from its contract.

    With ``of_server`` also those of the server in front of it: bodies that are no JSON, methods that do not exist.
    """
    from . import any_api

    if api in APIS:  # which has a module of checks, or none
        try:
            importlib.import_module(f"{__package__}.{api.name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__package__}.{api.name}":
                raise
    derived = (found for found in any_api.checks(api) if of_server or not found.is_of_server)
    return [*_BY_API.get(contract_of(api), ()), *derived]


async def run_check(found: Check, subject: Subject) -> Outcome:
    """Run one check. Never raises for what it finds."""
    began = monotonic()
    verdict, reason = Verdict.PASSED, ""
    try:
        async with asyncio.timeout(TIME_LIMIT_SECONDS):
            await found.run(subject)
    except Skipped as skip:
        verdict, reason = Verdict.SKIPPED, str(skip)
    except NotProvidedError as error:  # 501 is an answer that the contract allows
        verdict, reason = Verdict.SKIPPED, error.detail
    except TimeoutError:
        verdict, reason = Verdict.FAILED, f"it took longer than {TIME_LIMIT_SECONDS:g} s"
    except AssertionError as error:
        verdict, reason = Verdict.FAILED, _first(str(error)) or "an assertion failed"
    except StackError as error:
        verdict, reason = Verdict.FAILED, f"{error.code}: {error.detail}"
    except Exception as error:
        verdict, reason = Verdict.FAILED, f"{type(error).__name__}: {_first(str(error))}"
    return Outcome(found, verdict, monotonic() - began, reason)


async def refused(call: Awaitable[object], *kinds: type[StackError]) -> StackError:
    """The error that a call ends with, which must be one of ``kinds``; an iterator is read to its end."""
    try:
        answer = await call
        if hasattr(answer, "__aiter__"):
            answer = [item async for item in answer]
    except kinds as error:
        return error
    wanted = " or ".join(f"{kind.status} {kind.code}" for kind in kinds)
    raise AssertionError(f"expected a refusal ({wanted}), got {_first(repr(answer))}")


async def everything(items: Any) -> list[Any]:
    """The items of an answer that is an iterator."""
    assert hasattr(items, "__aiter__"), f"expected a stream, got {type(items).__name__}"
    return [item async for item in items]


def _first(text: str) -> str:
    return " ".join(text.split())[:500]
