"""An implementation of any contract that hands each call to one function: what all wrappers are made of.

A call is an operation and its arguments. Its answer is nothing, a value, or items that come one by one; ``Answer`` is
the common form, whose ``items`` are a stream that has already begun, so that what goes wrong at its start is known.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from llama_stack.apis import Api, Operation, Shape, operations
from llama_stack.apis.contract import other_methods

A = TypeVar("A", bound=Api)


@dataclass(frozen=True)
class Call:
    """One call of an operation."""

    operation: Operation
    arguments: Mapping[str, Any]

    @property
    def is_stream(self) -> bool:
        """Whether the answer is items."""
        return self.operation.shape is Shape.LINES or self.operation.wants_stream(self.arguments)

    def key(self) -> str:
        """The same for the same call: the operation and its arguments as JSON, what is left at its default included."""
        values = {
            parameter.name: parameter.adapter.dump_python(self.arguments[parameter.name], mode="json")
            for parameter in (*self.operation.query.values(), *([self.operation.body] if self.operation.body else []))
            if parameter.name in self.arguments
        }
        return json.dumps([self.operation.key, values], sort_keys=True, ensure_ascii=False)


Handle = Callable[[Call], Awaitable[Any]]
"""Answers a call: with ``None``, a value or an async iterator, as the provider's own method would."""


def forwarding(contract: type[A], handle: Handle, behind: Sequence[Api]) -> A:
    """An implementation of ``contract`` whose every operation is ``handle``.

    What is no operation, such as ``models``, is asked of all that stand ``behind``: lists are joined, each item once.
    """
    members: dict[str, Any] = {operation.name: _operation(operation, handle) for operation in operations(contract)}
    members |= {name: _joined(name, getattr(contract, name), behind) for name in other_methods(contract)}
    members["unready_reason"] = lambda self: _unready(behind)
    return cast(A, type(f"Forwarding{contract.__name__}", (contract,), members)())


async def call(provider: Api, asked: Call) -> Any:
    """The provider's own answer."""
    return await getattr(provider, asked.operation.name)(**asked.arguments)


async def begun(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The items, after the first of them is there. Raises what the stream raises before it."""
    try:
        first = [await anext(items)]
    except StopAsyncIteration:
        first = []
    except BaseException:
        await close(items)
        raise
    return _Begun(first, items)


async def close(items: AsyncIterator[Any]) -> None:
    """Stop an iterator and the work behind it."""
    if hasattr(items, "aclose"):
        await items.aclose()


class _Begun(AsyncIterator[Any]):
    """Items of which the first are here already. Closing it closes the others, also before any was taken."""

    def __init__(self, first: list[Any], rest: AsyncIterator[Any]) -> None:
        self._first = first
        self._rest = rest

    async def __anext__(self) -> Any:
        return self._first.pop(0) if self._first else await anext(self._rest)

    async def aclose(self) -> None:
        self._first.clear()
        await close(self._rest)


def watched(
    items: AsyncIterator[Any], seen: Callable[[Any], None], ended: Callable[[BaseException | None], None]
) -> AsyncIterator[Any]:
    """The items, each shown to ``seen``; ``ended`` hears how they ended, or nothing where the reader left."""
    return _Watched(items, seen, ended)


class _Watched(AsyncIterator[Any]):
    """No generator: closing one that was not begun runs none of it, and what is behind would stay open."""

    def __init__(
        self,
        items: AsyncIterator[Any],
        seen: Callable[[Any], None],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self._items, self._seen, self._ended = items, seen, ended

    async def __anext__(self) -> Any:
        try:
            item = await anext(self._items)
        except StopAsyncIteration:
            self._ended(None)
            raise
        except Exception as error:
            self._ended(error)
            raise
        self._seen(item)
        return item

    async def aclose(self) -> None:
        await close(self._items)


def _operation(operation: Operation, handle: Handle) -> Any:
    async def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = operation.signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        del arguments["self"]
        return await handle(Call(operation, arguments))

    forward.__name__, forward.__doc__ = operation.name, operation.doc
    return forward


def _joined(name: str, method: Callable[..., Any], behind: Sequence[Api]) -> Any:
    async def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        answers = []
        failure: Exception | None = None
        for provider in behind:
            try:
                answers.append(await getattr(provider, name)(*args, **kwargs))
            except Exception as error:  # another may still answer
                failure = failure or error
        if failure is not None and not answers:
            raise failure
        if answers and isinstance(answers[0], bool):
            return any(answers)
        found: list[Any] = []
        for item in (item for answer in answers for item in answer):
            if item not in found:
                found.append(item)
        return found

    forward.__name__, forward.__doc__ = name, method.__doc__
    return forward


def _unready(behind: Sequence[Api]) -> str | None:
    reasons = [provider.unready_reason() for provider in behind]
    return reasons[0] if reasons and all(reasons) else None
