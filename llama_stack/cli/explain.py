"""``llama-stack explain``: the way of a request through a distribution, without starting it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import plugins_dir, registry

if TYPE_CHECKING:
    from ..apis.contract import Operation
    from ..distribution import Distribution
    from ..plugins import ProviderSpec
    from ..registry import Need, Registry


@click.command(name="explain")
@click.argument("distribution", metavar="NAME|FILE")
@click.argument("operation", metavar='"METHOD /PATH"')
@plugins_dir
def command(distribution: str, operation: str, plugins_dir: Path | None) -> None:
    """Say which provider of a distribution answers a request, why, and what that provider needs."""
    from ..distribution import load_distribution

    known = registry(plugins_dir)
    found = load_distribution(distribution, environ=os.environ, registry=known)
    for line in _explained(_operation(operation, found, known), found, known):
        click.echo(line)


def _operation(text: str, distribution: Distribution, known: Registry) -> Operation:
    """The operation that a person means. Raises ``NotFoundError`` with what comes near."""
    from ..apis import APIS, operations
    from ..errors import NotFoundError, nearest

    served = [known.api(name) for name in distribution.providers]
    by_key = {op.key: op for api in dict.fromkeys((*APIS, *served)) for op in operations(api)}
    method, _, path = " ".join(text.split()).partition(" ")
    asked = f"{method.upper()} {path}"
    if asked in by_key:
        return by_key[asked]
    others = [key for key in by_key if path and key.endswith(f" {path}")]
    hint = f"; did you mean {others[0]!r}?" if others else nearest(asked, by_key)
    if distribution.faces and not hint:
        names = ", ".join(face.face for face in distribution.faces)
        hint = f"; the faces ({names}) have routes of their own, which GET /openapi-ext.json of a running server shows"
    raise NotFoundError(f"no API has the operation {asked!r}{hint}", param="operation")


def _explained(operation: Operation, distribution: Distribution, known: Registry) -> Iterator[str]:
    from ..apis import Models

    api = operation.api
    kind = "an extension" if operation.is_extension else "of the draft"
    yield operation.key
    yield f"  contract    {api.__name__}.{operation.name}, {kind}: {_sentence(operation.doc)}"
    for layer in distribution.middleware:
        yield f"  middleware  {layer.middleware} of {known.middleware(layer.middleware).plugin.label}"
    entries = distribution.providers.get(api.name, ())
    if api is Models:
        yield "  provider    the stack itself: it joins what all providers serve"
        return
    if not entries:
        yield f"  provider    none: the request is answered 501, for {distribution.name!r} has no {api.name!r}"
        return
    yield f"  why         {_why(operation, len(entries))}"
    for number, entry in enumerate(entries, 1):
        installed = known.provider(api, entry.provider)
        name = entry.provider if entry.id in (None, entry.provider) else f"{entry.id} ({entry.provider})"
        place = f"  provider    {name}" if len(entries) == 1 else f"  provider {number}  {name}"
        optional = ", optional: 503 with the reason while it is down" if entry.optional else ""
        yield f"{place} of {installed.plugin.label}{optional}"
        yield from _needs(installed.spec, distribution)


def _sentence(doc: str) -> str:
    """The first sentence of a docstring, without its marks for code."""
    return doc.splitlines()[0].partition(";")[0].replace("``", "").rstrip(".")


def _why(operation: Operation, count: int) -> str:
    from ..apis.contract import Shape

    api, resource = operation.api.name, operation.resource
    if count == 1:
        return f"the only provider of {api!r} gets every request"
    if resource is None and operation.shape is Shape.LINES:
        return "all of them are asked, and their lists are joined"
    if resource is None:
        return "the request names nothing that one of them holds, so the first gets it"
    others = "; what is new goes to the first" if operation.creates else ""
    return f"the first of them that holds the {resource!r} which the request names{others}"


def _needs(spec: ProviderSpec, distribution: Distribution) -> Iterator[str]:
    from ..registry import needs

    asked = [_need(need, distribution) for need in needs(spec.start)]
    yield f"    needs     {'; '.join(asked) if asked else 'nothing'}"


def _need(need: Need, distribution: Distribution) -> str:
    from ..apis import Models
    from ..registry import NeedKind

    if need.kind is NeedKind.TOOLS:
        return f"the tools ({', '.join(tool.id or tool.tool for tool in distribution.tools) or 'none'})"
    if need.kind is not NeedKind.API:
        words = {"config": "its config", "database": "a database", "blobs": "a folder of blobs"}
        return words.get(need.kind.value, "the providers that its config names")
    assert need.api is not None, "an API is asked for"
    if need.api is Models:
        return "models, of the stack itself"
    serving = [entry.id or entry.provider for entry in distribution.providers.get(need.api.name, ())]
    return (
        f"{need.api.name}, from {', '.join(serving)}"
        if serving
        else f"{need.api.name} if it were served, which it is not"
    )
