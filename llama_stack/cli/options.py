"""Options that several commands have."""

from __future__ import annotations

import click


def _address(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    from ..apis.config import server_url

    try:
        return server_url(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


server_url = click.option(
    "--url",
    envvar="LLAMA_STACK_URL",
    default="http://127.0.0.1:8321",
    show_default=True,
    show_envvar=True,
    callback=_address,
    metavar="URL",
    help="The server to ask.",
)
