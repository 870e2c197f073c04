"""Valid values for any contract, made from its own annotations: requests to send, replies to expect, and a provider.

A contract's types say all that a sample needs, so a third party's API is exercised by the same code as ours::

    provider = scripted(MemoryBanks)()
    await provider.drop(bank_uuid="b")        # answers with a sample of the operation's result
    provider.calls                            # [("drop", {"bank_uuid": "b"})]
"""

from __future__ import annotations

import types
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import AwareDatetime, BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import TypeAliasType

from ..apis.contract import Api, Operation, Shape, operations, other_methods

A = TypeVar("A", bound=Api)
_MOMENT = datetime(2024, 7, 23, 12, 0, tzinfo=UTC)
_CANDIDATES: dict[Any, tuple[Any, ...]] = {
    str: ("sample", "https://example.com/sample"),
    bytes: (b"\x00sample\xff",),
    bool: (False,),
    int: (1, 2, 10, 100, 1_000, 0),
    float: (0.5, 0.25, 1.0, 10.0, 0.0),
    datetime: (_MOMENT,),
    AwareDatetime: (_MOMENT,),
}
"""What is tried for a plain type; the first that the field's own constraints allow is taken."""


def sample(annotation: Any, *, is_full: bool = False) -> Any:
    """A valid value of the type; with ``is_full`` every optional field is there, otherwise only those that must be."""
    return _sample(annotation, (), is_full)


def arguments(operation: Operation, *, is_full: bool = False) -> dict[str, Any]:
    """Valid arguments for a call of the operation, by name; whole replies are asked for, not streams."""
    parameters = [*operation.query.values(), *([operation.body] if operation.body else [])]
    return {p.name: sample(p.annotation, is_full=is_full) for p in parameters if p.is_required}


def scripted(contract: type[A]) -> Callable[[], A]:
    """A provider class of the contract that records its ``calls`` and answers each with a full sample."""
    members: dict[str, Any] = {operation.name: _answer(operation) for operation in operations(contract)}
    for name in other_methods(contract):
        method = getattr(contract, name)
        if getattr(method, "__isabstractmethod__", False):
            members[name] = _other_answer(name, get_type_hints(method, include_extras=True)["return"])
    members["__init__"] = lambda self: setattr(self, "calls", [])
    return cast(Callable[[], A], type(f"Scripted{contract.__name__}", (contract,), members))


def _answer(operation: Operation) -> Callable[..., Any]:
    async def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = operation.signature.bind(self, *args, **kwargs).arguments
        del bound["self"]
        self.calls.append((operation.name, dict(bound)))
        if operation.shape is Shape.VOID:
            return None
        if operation.shape is Shape.LINES:
            return _each([sample(operation.result, is_full=True), sample(operation.result)])
        if operation.wants_stream(bound):
            return _each([sample(operation.chunk), sample(operation.chunk, is_full=True)])
        return sample(operation.result, is_full=True)

    return answer


def _other_answer(name: str, annotation: Any) -> Callable[..., Any]:
    async def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, {}))
        return sample(annotation)

    return answer


async def _each(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


def _sample(annotation: Any, constraints: tuple[Any, ...], is_full: bool) -> Any:
    origin = get_origin(annotation)
    if isinstance(annotation, TypeAliasType):
        return _sample(annotation.__value__, constraints, is_full)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _sample(inner, (*constraints, *more), is_full)
    if origin in (Union, types.UnionType):
        choices = [choice for choice in get_args(annotation) if choice is not type(None)]
        return _sample(choices[0], constraints, is_full)
    if origin is Literal:
        return get_args(annotation)[0]
    if origin is list:
        return [_sample(get_args(annotation)[0], (), is_full)]
    if origin is dict:
        return {"key": _sample(get_args(annotation)[1], (), is_full)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _sample_model(annotation, is_full)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return list(annotation)[-1]  # the first of the reasons for a stop is "not stopped"
    if annotation in _CANDIDATES:
        return _first_valid(annotation, constraints)
    return "sample"  # JSON of any kind


def _first_valid(plain: Any, constraints: tuple[Any, ...]) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[plain, *constraints] if constraints else plain)
    for candidate in _CANDIDATES[plain]:
        try:
            return adapter.validate_python(candidate)
        except ValidationError:
            continue
    raise ValueError(f"no sample of {plain.__name__} fits {constraints}; give the field wider limits or a default")


def _sample_model(model: type[BaseModel], is_full: bool) -> BaseModel:
    fields: Iterable[tuple[str, FieldInfo]] = model.model_fields.items()
    values = {
        name: _sample(field.annotation, tuple(field.metadata), is_full)
        for name, field in fields
        if field.is_required() or (is_full and field.annotation is not bool)
    }
    return model.model_validate(values)
