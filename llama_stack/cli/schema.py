"""``llama-stack schema``."""

from __future__ import annotations

import json

import click

from .output import warning


@click.command(name="schema")
def command() -> None:
    """Print the JSON Schema of distributions.

    It holds the settings of every installed provider; editors use it to complete and to check.
    """
    from ..distribution import json_schema
    from ..registry import Registry

    registry = Registry()
    click.echo(json.dumps(json_schema(registry), indent=2))
    for fault in registry.faults:
        warning(str(fault))
