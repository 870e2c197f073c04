"""``llama-stack version``."""

from __future__ import annotations

import platform

import click

from .. import __version__


@click.command(name="version")
def command() -> None:
    """Print the version of llama-stack and of Python."""
    click.echo(f"llama-stack {__version__} on Python {platform.python_version()}")
