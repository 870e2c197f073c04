"""``llama-stack check``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from .options import plugins_dir, registry


@click.command(name="check")
@click.argument("distribution", metavar="NAME|FILE")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of the faults.")
@plugins_dir
def command(distribution: str, as_json: bool, plugins_dir: Path | None) -> int:
    """Look a distribution over without starting it.

    Every fault is printed as FILE:LINE:COL: key.path: what; remedy.
    """
    from ..distribution import check_distribution

    faults = check_distribution(distribution, environ=os.environ, registry=registry(plugins_dir))
    if as_json:
        click.echo(json.dumps([asdict(fault) for fault in faults], indent=2))
        return 1 if faults else 0
    for fault in faults:
        click.echo(str(fault))
    if not faults:
        click.echo(f"{distribution}: no faults")
    return 1 if faults else 0
