"""``llama-stack list``: what is installed, and what a server serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import plugins_dir, registry, server_url
from .output import Row, show, warning

if TYPE_CHECKING:
    from ..errors import StackError

as_json = click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")


@click.group(name="list")
def command() -> None:
    """List what is installed, or what a running server serves."""


@command.command(name="apis")
@plugins_dir
@as_json
def apis(plugins_dir: Path | None, as_json: bool) -> None:
    """List the APIs: the core's, and those of plugins."""
    from ..apis import operations

    known = registry(plugins_dir)
    providers = known.providers()
    rows: list[Row] = [
        {
            "api": found.spec.name,
            "operations": len(operations(found.spec.api)),
            "providers": ", ".join(p.spec.name for p in providers if p.spec.api is found.spec.api),
            "package": found.plugin.label,
        }
        for found in known.apis()
    ]
    show(rows, ("api", "operations", "providers", "package"), as_json=as_json)
    _warn([*known.faults, *known.duplicates])


@command.command(name="providers")
@plugins_dir
@as_json
def providers(plugins_dir: Path | None, as_json: bool) -> None:
    """List the providers that a distribution may name."""
    known = registry(plugins_dir)
    rows = [
        {
            "api": found.spec.api.name,
            "provider": found.spec.name,
            "package": found.plugin.label,
            "description": found.spec.description,
        }
        for found in known.providers()
    ]
    show(rows, ("api", "provider", "package", "description"), as_json=as_json)
    _warn([*known.faults, *known.duplicates])


@command.command(name="tools")
@plugins_dir
@as_json
def tools(plugins_dir: Path | None, as_json: bool) -> None:
    """List the tools that a distribution may name, and what each may ask to touch."""
    known = registry(plugins_dir)
    rows: list[Row] = [
        {
            "tool": found.spec.name,
            "package": found.plugin.label,
            "permissions": ", ".join(found.spec.permissions) or None,
            "description": found.spec.description,
        }
        for found in known.tools()
    ]
    show(rows, ("tool", "package", "permissions", "description"), as_json=as_json)
    _warn([*known.faults, *known.duplicates])


@command.command(name="plugins")
@plugins_dir
@as_json
def plugins(plugins_dir: Path | None, as_json: bool) -> None:
    """List the installed plugins, and why one of them cannot be used."""
    known = registry(plugins_dir)
    known.load_all()
    rows = []
    for plugin in known.plugins:
        fault = known.fault_of(plugin)
        rows.append(
            {
                "plugin": ", ".join(plugin.names),
                "package": plugin.package,
                "version": plugin.version,
                "state": "loaded" if fault is None else f"{fault.cause}; {fault.remedy}",
            }
        )
    show(rows, ("plugin", "package", "version", "state"), as_json=as_json)
    _warn(known.duplicates)


@command.command(name="distributions")
@as_json
def distributions(as_json: bool) -> None:
    """List the distributions that can be run by name."""
    from ..distribution import shipped_distributions

    rows = [{"distribution": name, "file": str(path)} for name, path in shipped_distributions().items()]
    show(rows, ("distribution", "file"), as_json=as_json)


@command.command(name="models")
@server_url
@as_json
def models(url: str, as_json: bool) -> None:
    """List the models that a running server serves."""
    from ..client import Client

    with Client(url) as client:
        rows = [
            {
                "model": model.model,
                "kind": model.kind.value,
                "device": model.device,
                "context_tokens": model.context_tokens,
                "alias_of": model.alias_of,
                "provider": model.provider_id,
            }
            for model in client.models.list_models()
        ]
    show(rows, ("model", "kind", "device", "context_tokens", "alias_of", "provider"), as_json=as_json)


def _warn(errors: Sequence[StackError]) -> None:
    """Say why something in the list is missing, or cannot be used though it is there."""
    for error in errors:
        warning(str(error))
