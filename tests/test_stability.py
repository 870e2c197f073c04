"""What is public is written down, a line each, and the code must agree with the list (docs/stability.md)."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from pydantic import BaseModel

from llama_stack import errors, plugins
from llama_stack.apis import APIS, Operation, operations
from llama_stack.cli.commands import _COMMANDS
from llama_stack.distribution import Distribution

LIST = Path(__file__).parent / "public_interface.txt"

PACKAGES = (
    "llama_stack.apis",
    "llama_stack.client",
    "llama_stack.distribution",
    "llama_stack.storage",
    "llama_stack.testing",
    "llama_stack.testing.conformance",
)
"""Whose ``__all__`` is public."""

MODULES = (
    "llama_stack.apis.common",
    "llama_stack.apis.filters",
    "llama_stack.children",
    "llama_stack.cli.options",
    "llama_stack.cli.output",
    "llama_stack.errors",
    "llama_stack.fetch",
    "llama_stack.inner",
    "llama_stack.plugins",
    "llama_stack.shields",
    "llama_stack.text_inference",
    "llama_stack.tools",
    "llama_stack.turns",
    *(f"llama_stack.apis.{api.name}" for api in APIS),
)
"""Whose names without an underscore are public, as far as they are made there."""


def public() -> set[str]:
    """Every line of the list, read off the code."""
    return {
        *(f"name {module}.{name}" for module in PACKAGES for name in importlib.import_module(module).__all__),
        *(f"name {module}.{name}" for module in MODULES for name in _made_in(importlib.import_module(module))),
        *_contracts(),
        *_errors(),
        *(f"hook {name}{_shown(hook)}" for name, hook in vars(plugins).items() if hasattr(hook, "llama_stack_spec")),
        *_keys(Distribution, ""),
        *_commands(),
    }


def _made_in(module: ModuleType) -> Iterator[str]:
    for name, value in vars(module).items():
        is_made = inspect.isclass(value) or inspect.isfunction(value)
        if is_made and not name.startswith("_") and value.__module__ == module.__name__:
            yield name


def _contracts() -> Iterator[str]:
    seen: set[type[BaseModel]] = set()
    for api in APIS:
        module = importlib.import_module(f"llama_stack.apis.{api.name}")
        for operation in operations(api):
            kind = "extension" if operation.is_extension else "draft"
            yield f"route {operation.key} = {api.name}.{operation.name}, {kind}, {operation.shape.value}"
            yield f"method {api.name}.{operation.name}({', '.join(_parameters(operation))})"
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, BaseModel) and value.__module__ == module.__name__:
                seen.add(value)
    common = importlib.import_module("llama_stack.apis.common")
    seen |= {v for v in vars(common).values() if inspect.isclass(v) and issubclass(v, BaseModel) and v is not BaseModel}
    for model in seen:
        for name, field in model.model_fields.items():
            need = "required" if field.is_required() else "optional"
            yield f"field {model.__name__}.{name}: {need}"


def _parameters(operation: Operation) -> Iterator[str]:
    for parameter in (*operation.query.values(), *([operation.body] if operation.body else [])):
        yield parameter.name if parameter.is_required else f"{parameter.name}={parameter.default!r}"


def _errors() -> Iterator[str]:
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.StackError):
            yield f"error {name} = {value.status} {value.code}"


def _shown(hook: Any) -> str:
    return f"({', '.join(inspect.signature(hook).parameters)})"


def _keys(model: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        need = "required" if field.is_required() else "optional"
        yield f"key {path}{name}: {need}"
        for inner in _models(field.annotation):
            yield from _keys(inner, f"{path}{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)


def _commands() -> Iterator[str]:
    for name in _COMMANDS:
        command = importlib.import_module(f"llama_stack.cli.{name.replace('-', '_')}").command
        for each in [command, *getattr(command, "commands", {}).values()]:
            shown = name if each is command else f"{name} {each.name}"
            yield f"command {shown}"
            options = (
                flag for parameter in each.params if isinstance(parameter, click.Option) for flag in parameter.opts
            )
            yield from (f"option {shown} {flag}" for flag in options)


def test_the_public_interface_is_as_it_is_written_down() -> None:
    """Plugins and clients are built against it: what goes or changes breaks them, and what comes stays for ever.

    ``LLAMA_STACK_WRITE_INTERFACE=1`` writes the list anew; a line that goes from it needs two minor releases' warning.
    """
    found = public()
    if os.environ.get("LLAMA_STACK_WRITE_INTERFACE"):
        LIST.write_text("".join(f"{line}\n" for line in sorted(found)))
    listed = set(LIST.read_text().splitlines())
    assert sorted(listed - found) == [], "gone or changed: put it back, or deprecate it first"
    assert sorted(found - listed) == [], "new: write it down, for it stays"


def test_the_list_would_notice() -> None:
    """It has every kind of line, and enough of each to be no accident."""
    kinds = [line.partition(" ")[0] for line in LIST.read_text().splitlines()]
    least = {"name": 150, "route": 30, "method": 30, "field": 150, "error": 30, "hook": 6, "key": 40, "command": 10}
    assert {kind: kinds.count(kind) >= count for kind, count in least.items()} == dict.fromkeys(least, True)
    assert "option" in kinds
