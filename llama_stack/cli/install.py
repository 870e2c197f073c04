"""``llama-stack install``: the packages that a distribution needs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import click


@click.command(name="install")
@click.argument("distribution", metavar="NAME|FILE")
@click.option("--yes", is_flag=True, help="Install what is missing with pip, into the environment of this command.")
def command(distribution: str, yes: bool) -> int:
    """Print one line that installs the packages of a distribution's providers, or run it."""
    from ..distribution import needed_packages
    from ..errors import DistributionError

    needed = needed_packages(distribution, environ=os.environ)
    if needed.unknown:
        raise DistributionError([str(fault) for fault in needed.unknown])
    if not needed.requirements:
        click.echo(f"{distribution}: nothing to install")
        return 0
    if not yes:
        click.echo(shlex.join(["pip", "install", *needed.requirements]))
        return 0
    if not needed.missing:
        click.echo(f"{distribution}: everything is installed")
        return 0
    return subprocess.run([sys.executable, "-m", "pip", "install", *needed.missing], check=False).returncode
