"""Whether a provider's class keeps the contract of its API: every method, its parameters and its types.

The abstract class already refuses a provider that lacks a method; this finds the method that is there and cannot be
called as the contract says. What a provider leaves without an annotation is taken on trust.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .apis.contract import Api


def contract_problems(provider: type[Api], contract: type[Api]) -> list[str]:
    """What of the contract the class does not keep, one line a method and cause; empty when it keeps all of it."""
    if not issubclass(provider, contract):
        return [f"{provider.__name__} is not a subclass of {contract.__name__}"]
    problems: list[str] = []
    for name, promised in _methods(contract):
        given = getattr(provider, name, None)
        if given is promised:
            if getattr(given, "__isabstractmethod__", False):
                problems.append(f"{name} is missing")
        elif not inspect.isroutine(given):
            problems.append(f"{name} is not a method")
        else:
            problems += [f"{name} {problem}" for problem in _method_problems(given, promised)]
    return problems


def fits(given: Any, wanted: Any) -> bool:
    """Whether every value of the type ``given`` is one of the type ``wanted``; containers count as read-only."""
    given, wanted = _bare(given), _bare(wanted)
    if given is Any or wanted is Any or isinstance(given, TypeVar) or isinstance(wanted, TypeVar) or given == wanted:
        return True
    if _is_union(given):
        return all(fits(choice, wanted) for choice in get_args(given))
    if _is_union(wanted):
        return any(fits(given, choice) for choice in get_args(wanted))
    if get_origin(given) is Literal:
        values = get_args(given)
        if get_origin(wanted) is Literal:
            return set(values) <= set(get_args(wanted))
        return all(fits(type(value), wanted) for value in values)
    given_class, wanted_class = get_origin(given) or given, get_origin(wanted) or wanted
    if not (isinstance(given_class, type) and isinstance(wanted_class, type)):
        return False
    if not issubclass(given_class, wanted_class):
        return False
    pairs = zip(get_args(given), get_args(wanted), strict=False)  # AsyncGenerator[X, None] is an AsyncIterator[X]
    return all(fits(inner, outer) for inner, outer in pairs)


def annotation_of(function: Callable[..., Any], name: str) -> Any:
    """The type that a parameter (or ``return``) is annotated with, or ``inspect.Parameter.empty``.

    Raises ``NameError`` when it cannot be read at run time, as when the module lacks something that it names.
    """
    function = inspect.unwrap(function)
    annotations = getattr(function, "__annotations__", {})
    if name not in annotations:
        return inspect.Parameter.empty
    # one at a time: a class imported for the type checker alone may stand in another annotation
    holder = types.SimpleNamespace(__annotations__={name: annotations[name]})
    try:
        return get_type_hints(holder, globalns=getattr(function, "__globals__", {}), include_extras=True)[name]
    except Exception as error:  # the text of an annotation is code of the plugin's: it may raise anything
        raise NameError(str(error)) from error


def _methods(contract: type[Api]) -> Iterator[tuple[str, Callable[..., Any]]]:
    seen: set[str] = set()
    for owner in contract.__mro__[: contract.__mro__.index(Api) + 1]:
        for name, member in vars(owner).items():
            if not name.startswith("_") and inspect.isfunction(member) and name not in seen:
                seen.add(name)
                yield name, member


def _method_problems(given: Callable[..., Any], promised: Callable[..., Any]) -> Iterator[str]:
    function = inspect.unwrap(given)
    if not inspect.iscoroutinefunction(inspect.unwrap(promised)):  # no operation, but the server's way to ask
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            yield "is async"
        yield from _parameter_problems(function, promised)
        return
    if inspect.isasyncgenfunction(function):
        yield "yields; it should be a coroutine function that returns its iterator"
        return
    if not inspect.iscoroutinefunction(function):
        yield "is not async"
        return
    yield from _parameter_problems(function, inspect.unwrap(promised))
    try:
        returned = annotation_of(function, "return")
    except NameError as error:
        yield f"has a return type that cannot be read: {error}"
        return
    wanted = annotation_of(promised, "return")
    if returned is not inspect.Parameter.empty and not fits(returned, wanted):
        yield f"returns {_named(returned)} where the contract says {_named(wanted)}"


def _parameter_problems(given: Callable[..., Any], promised: Callable[..., Any]) -> Iterator[str]:
    theirs = list(inspect.signature(given).parameters.values())[1:]
    ours = list(inspect.signature(promised).parameters.values())[1:]
    kinds = {parameter.kind for parameter in theirs}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return
    by_name = {parameter.name: parameter for parameter in theirs}
    for position, parameter in enumerate(ours):
        found = by_name.pop(parameter.name, None)
        if found is None:
            yield f"lacks the parameter {parameter.name!r}"
        elif not _takes(found, theirs.index(found), parameter, position):
            yield f"takes {parameter.name!r} in another place; it is parameter {position + 1}, by name or position"
        elif parameter.default is not parameter.empty and found.default is found.empty:
            yield f"needs {parameter.name!r}, which callers may leave out"
        else:
            yield from _type_problems(given, promised, parameter.name)
    for extra in by_name.values():
        if extra.default is extra.empty and extra.kind not in (extra.VAR_POSITIONAL, extra.VAR_KEYWORD):
            yield f"needs {extra.name!r}, which the contract does not have"


def _takes(found: inspect.Parameter, place: int, promised: inspect.Parameter, position: int) -> bool:
    """Whether a call that passes the parameter as the contract allows, by name or by position, reaches it."""
    if promised.kind is promised.KEYWORD_ONLY:
        return found.kind in (found.KEYWORD_ONLY, found.POSITIONAL_OR_KEYWORD)
    return found.kind is found.POSITIONAL_OR_KEYWORD and place == position


def _type_problems(given: Callable[..., Any], promised: Callable[..., Any], name: str) -> Iterator[str]:
    try:
        accepted = annotation_of(given, name)
    except NameError as error:
        yield f"has a type of {name!r} that cannot be read: {error}"
        return
    wanted = annotation_of(promised, name)
    if accepted is not inspect.Parameter.empty and not fits(wanted, accepted):
        yield f"takes {_named(accepted)} as {name!r} where the contract says {_named(wanted)}"


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return type(None) if annotation is None else annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _named(annotation: Any) -> str:
    bare = _bare(annotation)
    if get_args(bare):
        inner = [_named(argument) for argument in get_args(bare)]
        if _is_union(bare):
            return " | ".join(inner)
        return f"{getattr(get_origin(bare), '__name__', get_origin(bare))}[{', '.join(inner)}]"
    return "None" if bare is type(None) else getattr(bare, "__name__", str(bare))
