"""Running shields so that nothing gets past them: several at once, failing closed, and over text that still grows.

Whoever lets a model speak to somebody (an agent, a face) uses this in front of the Safety API. What a shield is, is the
business of its provider.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from .apis.common import Message, ShieldConfig
from .apis.safety import RunShieldRequest, RunShieldResponse, Safety, Violation
from .errors import StackError

logger = logging.getLogger("llama_stack.shields")

SHIELD_ERROR = "shield_error"
"""The ``violation_type`` of a shield that came to no verdict."""
REFUSAL = "I can't help with that."
"""What to answer where a violation suggests nothing."""


async def objection(
    safety: Safety, shields: Sequence[ShieldConfig], messages: Sequence[Message], *, timeout_seconds: float
) -> Violation | None:
    """The first objection, in the order of ``shields``, to the last of ``messages``; they all judge at once.

    A shield that raises, answers something else, or takes longer than ``timeout_seconds``, objects: no verdict is no
    permission.
    """
    verdicts = await asyncio.gather(*(_verdict(safety, shield, messages, timeout_seconds) for shield in shields))
    return next((violation for violation in verdicts if violation is not None), None)


class Withheld:
    """Text that is let out only once all of it so far has been judged.

    ``judge`` is given the whole text, not the latest piece, so that what is forbidden cannot hide in a seam. It judges
    each time ``window_characters`` are waiting, and at the end; with ``None`` at the end only. After an objection
    nothing more comes out::

        text = Withheld(judge, window_characters=200)
        async for delta in deltas:
            yield await text.add(delta)
        yield await text.end()          # and look at text.violation
    """

    def __init__(self, judge: Callable[[str], Awaitable[Violation | None]], *, window_characters: int | None) -> None:
        self.violation: Violation | None = None
        self.released = ""
        """What was let out."""
        self._judge = judge
        self._window = window_characters
        self._waiting = ""

    async def add(self, delta: str) -> str:
        """Take a piece; what may leave now, often nothing."""
        self._waiting += delta
        if self._window is None or len(self._waiting) < self._window:
            return ""
        return await self._judged()

    async def end(self) -> str:
        """Judge what is left, even where that is nothing: the whole may still be more than the text."""
        return await self._judged()

    async def _judged(self) -> str:
        if self.violation is None:
            self.violation = await self._judge(self.released + self._waiting)
        if self.violation is not None:
            return ""
        cleared, self._waiting = self._waiting, ""
        self.released += cleared
        return cleared


async def _verdict(
    safety: Safety, shield: ShieldConfig, messages: Sequence[Message], timeout_seconds: float
) -> Violation | None:
    try:
        async with asyncio.timeout(timeout_seconds):
            request = RunShieldRequest(messages=list(messages), shield=shield)
            response: object = await safety.run_shield(request)  # whatever a stranger's provider makes of it
        if isinstance(response, RunShieldResponse) and isinstance(response.violation, Violation | None):
            return response.violation
        reason = "its answer is no verdict"
    except TimeoutError:
        reason = f"it took longer than {timeout_seconds:g} s"
    except StackError as error:
        reason = error.detail
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # a stranger's bug, and still no permission
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        logger.exception("shield %s failed", shield.shield_type)
        reason = "it failed; see the server's log"
    details = f"the shield {shield.shield_type!r} came to no verdict: {reason}"
    return Violation(violation_type=SHIELD_ERROR, details=details, suggested_user_response=REFUSAL)
