"""Checks of Safety."""

from __future__ import annotations

import asyncio

from ...apis import Safety
from ...apis.common import Message, ShieldConfig
from ...apis.safety import RunShieldRequest, RunShieldResponse
from ...errors import InvalidRequestError, NotFoundError, UnavailableError
from .checks import Skipped, check, refused
from .subject import Subject

_DRAFT_SHIELDS = ("llama_guard", "prompt_guard", "code_guard")
_MESSAGE = Message.user("What is the capital of Norway?")


async def _shields(subject: Subject) -> list[str]:
    """The shield types that answer: the provider's own name, and the draft's three."""
    found = []
    for name in dict.fromkeys((*((subject.provider,) if subject.provider else ()), *_DRAFT_SHIELDS)):
        try:
            await _run(subject, name, _MESSAGE)
        except NotFoundError:
            continue
        except UnavailableError:
            pass
        found.append(name)
    if not found:
        raise Skipped("no shield is served by a name that is known here")
    return found


async def _run(subject: Subject, shield: str, *messages: Message) -> RunShieldResponse:
    config = ShieldConfig(shield_type=shield, params={})
    return await subject.client.safety.run_shield(RunShieldRequest(messages=list(messages), shield=config))


@check(Safety)
async def a_harmless_message_is_judged(subject: Subject) -> None:
    """Every shield answers for a harmless message, with an objection that has a type, or with none."""
    for name in await _shields(subject):
        verdict = await _run(subject, name, _MESSAGE)
        if verdict.violation is not None:
            assert verdict.violation.violation_type, f"{name}: an objection without a type"


@check(Safety)
async def an_objection_is_no_error(subject: Subject) -> None:
    """A reply is 200 whether the shield objects or not, and its JSON is {} where it does not."""
    for name in await _shields(subject):
        message = {"role": "user", "content": "Hello!", "tool_calls": [], "tool_responses": []}
        body = {"messages": [message], "shield": {"shield_type": name, "params": {}}}
        reply = await subject.http.post("/safety/run_shield", json=body)
        assert reply.status_code == 200, f"{name}: {reply.status_code}"
        assert set(reply.json()) <= {"violation"}, f"{name}: keys {sorted(reply.json())}"


@check(Safety)
async def the_same_message_is_judged_the_same(subject: Subject) -> None:
    """A shield that changes its mind cannot be relied on, alone or beside seven other requests."""
    for name in await _shields(subject):
        alone = await _run(subject, name, _MESSAGE)
        together = await asyncio.gather(*(_run(subject, name, _MESSAGE) for _ in range(8)))
        assert all(verdict == alone for verdict in together), f"{name}: other verdicts beside others"


@check(Safety)
async def an_unknown_shield_is_404(subject: Subject) -> None:
    """A shield type that nobody runs is not passed over in silence."""
    await refused(_run(subject, subject.new_id("no-shield"), _MESSAGE), NotFoundError)


@check(Safety)
async def unknown_parameters_are_422(subject: Subject) -> None:
    """Parameters are validated by the shield: a typing error must not switch a rule off."""
    for name in await _shields(subject):
        config = ShieldConfig(shield_type=name, params={"no_such_parameter": 1})
        request = RunShieldRequest(messages=[_MESSAGE], shield=config)
        await refused(subject.client.safety.run_shield(request), InvalidRequestError)


@check(Safety)
async def no_messages_are_no_crash(subject: Subject) -> None:
    """A request without messages is answered or refused, never a 500."""
    for name in await _shields(subject):
        body = {"messages": [], "shield": {"shield_type": name, "params": {}}}
        reply = await subject.http.post("/safety/run_shield", json=body)
        assert reply.status_code in (200, 422), f"{name}: {reply.status_code}"


@check(Safety)
async def long_and_odd_texts_are_judged(subject: Subject) -> None:
    """Long texts and any characters get a verdict or a refusal, never a 500."""
    for name in await _shields(subject):
        for text in ("", " \n\t", "a" * 50_000, "\u202eright to left \U0001f600 \u0000", "<|eot_id|>" * 20):
            message = {"role": "user", "content": text, "tool_calls": [], "tool_responses": []}
            body = {"messages": [message], "shield": {"shield_type": name, "params": {}}}
            reply = await subject.http.post("/safety/run_shield", json=body)
            assert reply.status_code in (200, 400, 413, 422), f"{name}: {reply.status_code} for {text[:20]!r}"
