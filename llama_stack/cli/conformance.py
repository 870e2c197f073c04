"""``llama-stack conformance``: whether a server, anyone's, keeps the contracts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from .options import address

if TYPE_CHECKING:
    from ..testing.conformance import Report


@click.command(name="conformance")
@click.argument("url", metavar="URL", callback=address)
@click.option("--api", "apis", multiple=True, metavar="NAME", help="Try this API alone; may be given several times.")
@click.option("--model", metavar="NAME", help="The model to ask; by default the first that the server lists.")
@click.option("--api-key", envvar="LLAMA_STACK_API_KEY", show_envvar=True, help="Sent as a bearer token.")
@click.option(
    "--format", "form", type=click.Choice(["text", "json", "junit"]), default="text", help="How to print the report."
)
def command(url: str, apis: tuple[str, ...], model: str | None, api_key: str | None, form: str) -> int:
    """Try every operation of every API that a running server serves, and print a report with a score.

    What is made on the server has ids of its own and is deleted again. Exit code 0 means that every check passed.
    """
    report = asyncio.run(_run(url, apis, model, api_key))
    click.echo({"text": report.text, "json": report.json, "junit": report.junit}[form]())
    return 0 if report.score == 1.0 else 1


async def _run(url: str, names: tuple[str, ...], model: str | None, api_key: str | None) -> Report:
    from ..apis import APIS
    from ..apis.models import ModelKind
    from ..errors import NotFoundError, UpstreamError, listed
    from ..testing.conformance import Report, Subject, checks_for, run_check

    known = {api.name: api for api in APIS}
    for name in names:
        if name not in known:
            raise NotFoundError(f"no API is called {name!r}; there are {listed(known)}", param="api")
    subject = Subject(url, api_key=api_key, models={ModelKind.LLM: model} if model else None)
    try:
        if not await subject.answers():
            raise UpstreamError(f"nothing answers at {url}; see that the server runs, and that this is its address")
        apis = [known[name] for name in names] or await subject.served()
        checks = [check for api in apis for check in checks_for(api, of_server=True)]
        unserved = [] if names else [api.name for api in APIS if api not in apis]
        return Report(url, [await run_check(check, subject) for check in checks], unserved)
    finally:
        await subject.aclose()
