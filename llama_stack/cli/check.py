"""``llama-stack check``."""

from __future__ import annotations

import os

import click


@click.command(name="check")
@click.argument("distribution", metavar="NAME|FILE")
def command(distribution: str) -> int:
    """Look a distribution over without starting it.

    Every fault is printed as FILE:LINE:COL: key.path: what; remedy.
    """
    from ..distribution import check_distribution

    faults = check_distribution(distribution, environ=os.environ)
    for fault in faults:
        click.echo(str(fault))
    if not faults:
        click.echo(f"{distribution}: no faults")
    return 1 if faults else 0
