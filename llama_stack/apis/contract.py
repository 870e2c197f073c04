"""What an API is: one abstract class whose decorated methods are its HTTP operations.

Everything else is derived from it: the server's routes, the HTTP client, the remote provider, routing among several
providers, the OpenAPI document and the conformance tests. Nothing about an operation is stated twice::

    class Inference(Api, name="inference", routed_by="model"):
        @post("/inference/completion")
        async def completion(self, request: CompletionRequest) -> CompletionResponse | AsyncIterator[Chunk]:
            ...

How a signature is read:

* a parameter whose type is a ``Schema`` or a list is the JSON body; every other parameter is a query parameter, and its
  name is the name on the wire;
* ``-> None`` answers with an empty body, ``-> X`` with one JSON value, ``-> AsyncIterator[X]`` with one value a line,
  ``-> X | AsyncIterator[C]`` with one ``X``, or with a stream of ``C`` when the boolean ``stream`` of the body (or the
  boolean parameter ``follow``) asks for it.

An operation of the draft must be implemented. One marked ``extension=True`` has a default that answers 501, so that a
provider written before the operation existed keeps loading. This module knows no server and no provider.
"""

from __future__ import annotations

import inspect
import types
from abc import ABC
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, TypeAdapter

from ..errors import NotProvidedError
from .common import EXTENSION

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Method = Literal["GET", "POST", "DELETE"]
Handler = Callable[..., Awaitable[Any]]
_H = TypeVar("_H", bound=Handler)


class Shape(Enum):
    """What a success looks like on the wire."""

    VOID = "void"
    """200 with no body and no content type (spec rule G8)."""
    VALUE = "value"
    """One JSON value."""
    LINES = "lines"
    """One compact JSON value a line, or a JSON array when the client accepts only that (spec rule G6)."""
    REPLY = "reply"
    """One JSON value, or a stream of chunks when the request asks for it (spec rule G7)."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operation: a query parameter, or the body."""

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty
    is_extension: bool = False

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """Validates and dumps values of this parameter."""
        return TypeAdapter(self.annotation)


@dataclass(frozen=True)
class Operation:
    """One HTTP operation of an API, read off a decorated method."""

    api: type[Api]
    name: str
    method: Method
    path: str
    query: Mapping[str, Parameter]
    body: Parameter | None
    shape: Shape
    result: Any
    """The type of the value, of one line, or of the whole reply; ``None`` for ``VOID``."""
    chunk: Any
    """The type of one streamed chunk for ``REPLY``, else ``None``."""
    is_extension: bool
    creates: bool
    """Whether the operation brings the resource that it names into being."""
    resource: str | None
    """The query parameter, or the dotted path of a body field, that names the resource; requests are routed by it."""
    names: str | None
    """The query parameter, or the dotted path of a body field, with a new name for what the operation brings."""
    doc: str = field(compare=False)

    @property
    def key(self) -> str:
        """``POST /inference/completion``: the operation's name to people."""
        return f"{self.method} {self.path}"

    @cached_property
    def signature(self) -> inspect.Signature:
        """How the contract's method is called, ``self`` first."""
        return inspect.signature(inspect.unwrap(getattr(self.api, self.name)))

    @cached_property
    def result_adapter(self) -> TypeAdapter[Any]:
        """Validates and dumps the value, one line, or the whole reply."""
        return TypeAdapter(self.result)

    @cached_property
    def chunk_adapter(self) -> TypeAdapter[Any]:
        """Validates and dumps one streamed chunk."""
        return TypeAdapter(self.chunk)

    @property
    def stream_parameter(self) -> str | None:
        """The boolean query parameter that asks for a stream, where it is not the body's ``stream`` field."""
        return "follow" if self.shape is Shape.REPLY and "follow" in self.query else None

    def resource_of(self, arguments: Mapping[str, Any]) -> str | None:
        """The id of the resource that a call with these arguments names, or ``None`` where it names none."""
        return self._text_at(self.resource, arguments)

    def new_name_of(self, arguments: Mapping[str, Any]) -> str | None:
        """The name that a call with these arguments gives, or ``None`` where it gives none."""
        return self._text_at(self.names, arguments)

    def _text_at(self, place: str | None, arguments: Mapping[str, Any]) -> str | None:
        if place is None:
            return None
        if place in self.query:
            value = arguments.get(place)
        else:
            value = arguments.get(self.body.name) if self.body else None
            for part in place.split("."):
                value = getattr(value, part, None)
        return value if isinstance(value, str) else None

    def wants_stream(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments asks for chunks rather than for the whole reply."""
        if self.shape is not Shape.REPLY:
            return False
        if self.stream_parameter:
            return bool(arguments.get(self.stream_parameter))
        return bool(getattr(arguments.get(self.body.name) if self.body else None, "stream", False))


class Api(ABC):
    """Base of every contract. Subclass it with ``name=`` (the key in a distribution) and decorate the operations.

    ``routed_by`` names the resource that requests are dispatched by when a distribution runs several providers of the
    API. A provider subclasses the contract and implements its methods.
    """

    name: ClassVar[str]
    tag: ClassVar[str]
    """The tag of the API in the OpenAPI document: the name of the class."""
    routed_by: ClassVar[str | None] = None

    def __init_subclass__(cls, *, name: str | None = None, routed_by: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name, cls.tag, cls.routed_by = name, cls.__name__, routed_by

    async def owns(self, resource: str) -> bool:
        """Whether this provider holds the resource of that id; asked only when an API has several providers."""
        raise NotProvidedError(
            f"this provider of {self.name!r} cannot run beside another: it does not say what it owns"
        )

    def unready_reason(self) -> str | None:
        """Why this provider, though it is up, cannot serve now and will again by itself; None when it can.

        Called in the event loop whenever somebody asks whether the stack is ready, so it returns what is known already.
        Requests still reach the provider, which may let them wait.
        """
        return None

    def prometheus_metrics(self) -> Iterable[Metric]:
        """What ``GET /metrics`` shall show of this provider, besides whether it is up.

        Called at each scrape, in the event loop: it returns what is known already, as families of
        ``prometheus_client.core``. Names begin with the package's; the server adds the labels ``api`` and ``id``, which
        tell apart the providers of a distribution.
        """
        return ()

    def readiness_details(self) -> Mapping[str, str]:
        """What readiness and ``/providers/list`` shall say of this provider while it is up, besides that it is.

        Called in the event loop, so it returns what is known already: which of two ways of working is active, how its
        self-test came out. What stands under ``notice``, such as that a part stands in for another, ``llama-stack run``
        prints too. Nothing that is secret.
        """
        return {}


@dataclass(frozen=True)
class _Mark:
    """What a decorator records on a method until the contract is read."""

    method: Method
    path: str
    extension: bool
    resource: str | None
    creates: bool
    names: str | None


def get(path: str, *, extension: bool = False, resource: str | None = None) -> Callable[[_H], _H]:
    """Make a method of a contract the operation ``GET path``."""
    return _operation(_Mark("GET", path, extension, resource, False, None))


def post(
    path: str,
    *,
    extension: bool = False,
    resource: str | None = None,
    creates: bool = False,
    names: str | None = None,
) -> Callable[[_H], _H]:
    """Make a method of a contract the operation ``POST path``.

    ``creates`` says that the resource which it names may be new. An operation that brings another of the kind, of the
    provider that holds its resource, says with ``names`` which parameter or field has the new name.
    """
    return _operation(_Mark("POST", path, extension, resource, creates, names))


def delete(path: str, *, extension: bool = False, resource: str | None = None) -> Callable[[_H], _H]:
    """Make a method of a contract the operation ``DELETE path``."""
    return _operation(_Mark("DELETE", path, extension, resource, False, None))


def contract_of(cls: type[Api]) -> type[Api]:
    """The contract that a provider class implements: its nearest base that was declared with ``name=``."""
    for base in cls.__mro__:
        if "tag" in vars(base):
            return base
    raise TypeError(f"{cls.__qualname__} is not a contract and implements none")


def operations(api: type[Api]) -> tuple[Operation, ...]:
    """The operations of a contract, in the order in which they are written."""
    contract = contract_of(api)
    if "_operations" not in vars(contract):
        found = tuple(_read(contract, name, f) for name, f in vars(contract).items() if hasattr(f, "__operation__"))
        contract._operations = found  # type: ignore[attr-defined]  # kept on the class: reading is done once
    return contract._operations  # type: ignore[attr-defined, no-any-return]


def other_methods(api: type[Api]) -> list[str]:
    """The contract's coroutine methods that are no HTTP operations, such as ``models``."""
    listed = {operation.name for operation in operations(api)}
    return [
        name
        for name, _ in inspect.getmembers(contract_of(api), inspect.iscoroutinefunction)
        if name not in listed and not name.startswith("_")
    ]


def _operation(mark: _Mark) -> Callable[[_H], _H]:
    def decorate(method: _H) -> _H:
        handler: Any = _not_provided(method, mark) if mark.extension else method
        handler.__operation__ = mark
        handler.__isabstractmethod__ = not mark.extension
        return handler  # type: ignore[no-any-return]

    return decorate


def _not_provided(method: Handler, mark: _Mark) -> Handler:
    async def answer_501(self: Api, *args: Any, **kwargs: Any) -> Any:
        raise NotProvidedError(f"the provider of {self.name!r} does not implement {mark.method} {mark.path}")

    answer_501.__wrapped__ = method  # type: ignore[attr-defined]  # signature and annotations stay readable
    answer_501.__doc__ = method.__doc__
    answer_501.__name__ = method.__name__
    answer_501.__qualname__ = method.__qualname__
    return answer_501


def _read(api: type[Api], name: str, method: Any) -> Operation:
    mark: _Mark = method.__operation__
    source = inspect.unwrap(method)
    where = f"{api.__name__}.{name}"
    if not inspect.iscoroutinefunction(source):
        raise TypeError(f"{where} must be declared with 'async def'")
    hints = get_type_hints(source, include_extras=True)
    query: dict[str, Parameter] = {}
    body: Parameter | None = None
    for parameter in list(inspect.signature(source).parameters.values())[1:]:
        if parameter.name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{where}: parameter {parameter.name!r} needs a type and a name of its own")
        annotation = hints[parameter.name]
        found = Parameter(parameter.name, annotation, parameter.default, _is_extension(annotation))
        if _is_body(annotation):
            if body is not None:
                raise TypeError(f"{where} has two bodies: {body.name!r} and {parameter.name!r}")
            if mark.method != "POST":
                raise TypeError(f"{where}: {mark.method} carries no body, and {parameter.name!r} is one")
            body = found
        elif _is_scalar(annotation):
            query[parameter.name] = found
        else:
            raise TypeError(f"{where}: {parameter.name!r} is neither a schema or list (body) nor a scalar (query)")
    if "return" not in hints:
        raise TypeError(f"{where} does not say what it returns")
    shape, result, chunk = _result(hints["return"])
    resource = mark.resource or (api.routed_by if _names(api.routed_by, query, body) else None)
    doc = inspect.getdoc(source) or ""
    return Operation(
        api,
        name,
        mark.method,
        mark.path,
        query,
        body,
        shape,
        result,
        chunk,
        mark.extension,
        mark.creates,
        resource,
        mark.names,
        doc,
    )


def _is_extension(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated and EXTENSION in get_args(annotation)[1:]


def _is_body(annotation: Any) -> bool:
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return get_origin(bare) is list or (isinstance(bare, type) and issubclass(bare, BaseModel))


def _is_scalar(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return all(_is_scalar(choice) for choice in get_args(annotation))
    if get_origin(annotation) is Literal:
        return True
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if bare is not annotation:
        return _is_scalar(bare)
    return isinstance(bare, type) and issubclass(bare, str | int | float | type(None))


def _names(resource: str | None, query: Mapping[str, Parameter], body: Parameter | None) -> bool:
    if resource is None:
        return False
    fields = getattr(body.annotation, "model_fields", {}) if body else {}
    return resource in query or resource.split(".")[0] in fields


def _result(annotation: Any) -> tuple[Shape, Any, Any]:
    if annotation is type(None):
        return Shape.VOID, None, None
    if get_origin(annotation) is AsyncIterator:
        return Shape.LINES, get_args(annotation)[0], None
    if get_origin(annotation) in (Union, types.UnionType):
        iterators = [a for a in get_args(annotation) if get_origin(a) is AsyncIterator]
        values = [a for a in get_args(annotation) if get_origin(a) is not AsyncIterator]
        if len(iterators) == 1 and len(values) == 1:
            return Shape.REPLY, values[0], get_args(iterators[0])[0]
    return Shape.VALUE, annotation, None
