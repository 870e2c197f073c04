"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..registry import Registry


def address(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    """The address of a server, as it is given on the command line."""
    from ..apis.config import server_url

    try:
        return server_url(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


plugins_dir = click.option(
    "--plugins-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Know the plugins of one file in this folder too.",
)


def registry(folder: Path | None) -> Registry:
    """What is installed, and the plugins in the folder that ``--plugins-dir`` names."""
    from ..registry import Registry

    found = Registry()
    if folder is not None:
        found.add_folder(folder)
    return found


server_url = click.option(
    "--url",
    envvar="LLAMA_STACK_URL",
    default="http://127.0.0.1:8321",
    show_default=True,
    show_envvar=True,
    callback=address,
    metavar="URL",
    help="The server to ask.",
)
