"""Samples made from contracts."""

from __future__ import annotations

import pytest
from pydantic import Field

from llama_stack.apis import APIS, Api, Inference, operations, post
from llama_stack.apis.common import Schema
from llama_stack.client import chunks
from llama_stack.testing import arguments, sample, scripted


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_every_operation_has_valid_samples(api: type[Api]) -> None:
    """A sample that does not validate would make every check that sends it report the wrong thing."""
    for operation in operations(api):
        for is_full in (False, True):
            given = arguments(operation, is_full=is_full)
            for parameter in [*operation.query.values(), *([operation.body] if operation.body else [])]:
                if parameter.is_required:
                    text = parameter.adapter.dump_json(given[parameter.name], exclude_none=True)
                    assert parameter.adapter.validate_json(text) == given[parameter.name]


@pytest.mark.anyio
async def test_a_scripted_provider_records_calls_and_answers_with_samples() -> None:
    """It stands in for a provider wherever only the way to it is under test."""
    provider = scripted(Inference)()
    completion, chat = operations(Inference)[:2]
    given = arguments(completion)
    assert await provider.completion(**given) == sample(completion.result, is_full=True)
    streamed = given["request"].model_copy(update={"stream": True})
    reply = await provider.completion(streamed)
    assert [chunk async for chunk in chunks(reply)] == [
        sample(completion.chunk),
        sample(completion.chunk, is_full=True),
    ]
    assert provider.calls == [("completion", given), ("completion", {"request": streamed})]  # type: ignore[attr-defined]
    assert chat.name == "chat_completion"


class Narrow(Schema):
    """A field that no usual value fits."""

    value: int = Field(ge=1_000_000_007)


class Odd(Api, name="odd"):
    """A contract of it."""

    @post("/odd")
    async def odd(self, request: Narrow) -> None:
        """Takes it."""
        raise NotImplementedError


def test_a_field_that_no_sample_fits_is_named() -> None:
    """An author has to hear which limits are in the way, not see a random request refused."""
    with pytest.raises(ValueError, match="no sample of int fits"):
        arguments(operations(Odd)[0])
