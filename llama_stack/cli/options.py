"""Options that several commands have."""

from __future__ import annotations

from urllib.parse import urlsplit

import click


def _address(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise click.BadParameter("write http://HOST:PORT or https://HOST:PORT", ctx, parameter)
    return value


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
