"""``llama-stack schema``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .options import plugins_dir, registry
from .output import warning


@click.command(name="schema")
@plugins_dir
def command(plugins_dir: Path | None) -> None:
    """Print the JSON Schema of distributions.

    It holds the settings of every installed provider; editors use it to complete and to check.
    """
    from ..distribution import json_schema

    known = registry(plugins_dir)
    click.echo(json.dumps(json_schema(known), indent=2))
    for fault in known.faults:
        warning(str(fault))
