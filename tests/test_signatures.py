"""Whether a provider's class keeps the contract of its API, method by method."""

from __future__ import annotations

import inspect
import types
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal

import pytest

from llama_stack.apis import APIS, Api, get, post
from llama_stack.apis.common import Schema
from llama_stack.signatures import contract_problems, fits


class Item(Schema):
    """A thing."""

    name: str


class Part(Item):
    """A smaller thing."""


class Store(Api, name="test_store"):
    """A contract with every shape of method."""

    @post("/store/put")
    async def put(self, item: Item, *, times: int | None = None) -> None:
        """Keep it."""
        raise NotImplementedError

    @get("/store/find")
    async def find(self, name: str, limit: int = 10) -> Item | None:
        """Find it."""
        raise NotImplementedError

    @get("/store/list")
    async def list_items(self) -> AsyncIterator[Item]:
        """All of them."""
        raise NotImplementedError

    @get("/store/count", extension=True)
    async def count(self) -> int:
        """How many."""
        raise NotImplementedError


class Faithful(Store):
    """Keeps the contract, with narrower results, wider parameters and more of them."""

    async def put(self, item: Schema, times: int | str | None = None) -> None: ...

    async def find(self, name: str, limit: int = 20, case: bool = False) -> Part:
        return Part(name=name)

    async def list_items(self) -> AsyncGenerator[Part, None]:
        raise NotImplementedError


def test_a_faithful_provider_has_no_problems() -> None:
    """A subclass may take more and promise more; an operation added later has its default."""
    assert contract_problems(Faithful, Store) == []


def test_a_method_without_annotations_is_taken_on_trust() -> None:
    """What is not written down cannot contradict the contract."""

    class Plain(Store):
        async def find(self, name, limit=1):  # type: ignore[no-untyped-def]
            return None

        async def put(self, *args: Any, **kwargs: Any) -> None: ...

        async def list_items(self) -> Any: ...

    assert contract_problems(Plain, Store) == []


def broken(**methods: Any) -> type[Store]:
    """A faithful provider with some of its methods replaced."""
    return type("Broken", (Faithful,), methods)


async def put_needs_more(self: Any, item: Item, place: str, times: int | None = None) -> None: ...
async def put_other_name(self: Any, thing: Item, times: int | None = None) -> None: ...
async def put_narrow(self: Any, item: Part, times: int | None = None) -> None: ...
async def put_wrong_type(self: Any, item: str, times: int | None = None) -> None: ...
async def put_no_none(self: Any, item: Item, times: int = 0) -> None: ...
async def put_required(self: Any, item: Item, times: int | None) -> None: ...
async def put_keyword(self: Any, *, item: Item, times: int | None = None) -> None: ...
async def put_positional(self: Any, item: Item, /, times: int | None = None) -> None: ...
async def put_returns(self: Any, item: Item, times: int | None = None) -> Item: ...  # type: ignore[empty-body]
async def put_unreadable(self: Any, item: "Nowhere", times: int | None = None) -> None: ...  # type: ignore[name-defined]  # noqa: F821, UP037
async def find_swapped(self: Any, limit: int = 10, name: str = "") -> None: ...
async def find_text(self: Any, name: str, limit: int = 10) -> str: ...  # type: ignore[empty-body]
def find_sync(self: Any, name: str, limit: int = 10) -> Item: ...  # type: ignore[empty-body]
async def list_whole(self: Any) -> list[Item]: ...  # type: ignore[empty-body]
async def list_strings(self: Any) -> AsyncIterator[str]: ...  # type: ignore[empty-body]


async def list_yields(self: Any) -> AsyncIterator[Item]:
    yield Item(name="x")


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ({"put": put_needs_more}, "put needs 'place', which the contract does not have"),
        ({"put": put_other_name}, "put lacks the parameter 'item'"),
        ({"put": put_narrow}, "put takes Part as 'item' where the contract says Item"),
        ({"put": put_wrong_type}, "put takes str as 'item' where the contract says Item"),
        ({"put": put_no_none}, "put takes int as 'times' where the contract says int | None"),
        ({"put": put_required}, "put needs 'times', which callers may leave out"),
        ({"put": put_keyword}, "put takes 'item' in another place"),
        ({"put": put_positional}, "put takes 'item' in another place"),
        ({"put": put_returns}, "put returns Item where the contract says None"),
        ({"put": put_unreadable}, "put has a type of 'item' that cannot be read"),
        ({"put": 3}, "put is not a method"),
        ({"find": find_swapped}, "find takes 'name' in another place"),
        ({"find": find_text}, "find returns str where the contract says Item | None"),
        ({"find": find_sync}, "find is not async"),
        ({"list_items": list_whole}, "list_items returns list[Item] where the contract says AsyncIterator[Item]"),
        ({"list_items": list_strings}, "list_items returns AsyncIterator[str]"),
        ({"list_items": list_yields}, "list_items yields; it should be a coroutine function that returns"),
        ({"count": find_sync}, "count is not async"),
        ({"owns": find_sync}, "owns is not async"),
        ({"prometheus_metrics": list_strings}, "prometheus_metrics is async"),
        ({"prometheus_metrics": find_sync}, "prometheus_metrics needs 'name'"),
    ],
)
def test_each_way_to_break_a_contract_is_found_and_named(methods: dict[str, Any], problem: str) -> None:
    """An abstract class checks names alone; a wrong signature would otherwise show at the first request."""
    assert [found for found in contract_problems(broken(**methods), Store) if found.startswith(problem)]


def test_a_method_that_is_missing_is_named() -> None:
    """Statically too, before an instance could be made."""

    class Half(Store):
        async def put(self, item: Item, *, times: int | None = None) -> None: ...

    assert contract_problems(Half, Store) == ["find is missing", "list_items is missing"]


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_every_contract_of_the_core_can_be_kept(api: type[Api]) -> None:
    """The rules of the check must not refuse a class that repeats the contract word for word."""
    methods = {name: vars(api)[name] for name in vars(api) if getattr(vars(api)[name], "__isabstractmethod__", False)}
    repeated = {name: _copy(method) for name, method in methods.items()}
    assert contract_problems(type("Repeated", (api,), repeated), api) == []


def _copy(method: Any) -> Any:
    source = inspect.unwrap(method)
    copy = types.FunctionType(source.__code__, source.__globals__, source.__name__, source.__defaults__)
    copy.__annotations__, copy.__kwdefaults__ = source.__annotations__, source.__kwdefaults__
    return copy


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        (int, int, True),
        (bool, int, True),
        (int, str, False),
        (Part, Item, True),
        (Item, Part, False),
        (int, int | None, True),
        (int | None, int, False),
        (None, int | None, True),
        (list[Part], list[Item], True),
        (list[str], list[Item], False),
        (dict[str, int], dict[str, str], False),
        (AsyncGenerator[Part, None], AsyncIterator[Item], True),
        (Literal["a"], str, True),
        (Literal["a"], Literal["a", "b"], True),
        (Literal["a", "c"], Literal["a", "b"], False),
        (Literal[1], str, False),
        (Any, int, True),
        (int, Any, True),
    ],
)
def test_one_type_fits_another_when_all_its_values_do(given: Any, wanted: Any, expected: bool) -> None:
    """Results may be narrower, parameters wider."""
    assert fits(given, wanted) is expected
