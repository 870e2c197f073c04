"""The Safety API (an extension): judge messages by a shield. Agents use the same contract between their steps."""

from __future__ import annotations

from abc import abstractmethod

from .common import Items, Label, Maybe, Message, Schema, ShieldConfig, Text
from .contract import Api, post


class Violation(Schema):
    """Why a shield objected."""

    inline = True

    violation_type: Label
    details: Text
    suggested_user_response: Maybe[Text] = None


class RunShieldRequest(Schema):
    """Judge the last of these messages in the light of those before it."""

    messages: Items[Message]
    shield: ShieldConfig


class RunShieldResponse(Schema):
    """``violation`` is absent when the shield has no objection."""

    violation: Maybe[Violation] = None


class Safety(Api, name="safety", routed_by="shield.shield_type"):
    """Shields over messages."""

    @abstractmethod
    async def shields(self) -> list[str]:
        """The shield types that this provider runs."""

    async def owns(self, resource: str) -> bool:
        """Whether this provider runs shields of the type."""
        return resource in await self.shields()

    @post("/safety/run_shield", extension=True)
    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        """Judge messages. Raises ``NotFoundError`` for a shield type that is not provided here.

        Raises ``InvalidRequestError`` for ``params`` that the shield does not take, and only then for ``messages`` that
        are none: so parameters can be checked before there is anything to judge.
        """
