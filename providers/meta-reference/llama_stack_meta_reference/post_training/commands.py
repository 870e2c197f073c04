"""``llama-stack jobs``: list, watch, cancel and read training jobs of a running server."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING

import click

from llama_stack.cli.options import server_url
from llama_stack.cli.output import show

from .picture import Picture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_stack.client import Client

_FRESH_SECONDS = 0.1
"""How often the picture is drawn at most."""


@click.group(name="jobs")
def jobs() -> None:
    """List, watch and cancel training jobs, and read their logs."""


@jobs.command(name="list")
@server_url
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
def list_jobs(url: str, as_json: bool) -> None:
    """List all jobs, newest first."""
    from llama_stack.client import Client

    with Client(url) as client:
        rows = [{"job": _plain(job.job_uuid), "status": job.status.value} for job in client.post_training.list_jobs()]
    show(rows, ("job", "status"), as_json=as_json)


@jobs.command(name="cancel")
@server_url
@click.argument("job")
def cancel(url: str, job: str) -> None:
    """End a job that waits or runs; it is failed then."""
    from llama_stack.client import Client

    with Client(url) as client:
        client.post_training.cancel_job(job)
    click.echo(f"{_plain(job)} is cancelled")


@jobs.command(name="logs")
@server_url
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended.")
@click.argument("job")
def logs(url: str, follow: bool, job: str) -> None:
    """Print the log of a job."""
    from llama_stack.client import Client

    with Client(url) as client:
        for line in _lines(client, job, follow=follow):
            click.echo(_plain(line))


@jobs.command(name="watch")
@server_url
@click.argument("job")
def watch(url: str, job: str) -> int:
    """Show how far a job is, how fast, and its loss, until it has ended.

    On a terminal the picture is drawn anew as the job goes on; elsewhere a line is printed for each validation and
    checkpoint. Exit code 0: the job is completed, 1: it failed. Ctrl-C leaves the job alone.
    """
    from llama_stack.apis.post_training import JobStatus
    from llama_stack.client import Client

    is_live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    picture = Picture(_plain(job))
    drawn, last = 0, 0.0
    with Client(url) as client:
        for line in _lines(client, job, follow=True):
            event = picture.take(_plain(line))
            if is_live:
                if event != "step" or time.monotonic() - last > _FRESH_SECONDS:
                    drawn, last = _draw(picture, drawn), time.monotonic()
            elif event in ("started", "validation", "checkpoint", "trial", "note", "finished", "failed"):
                click.echo(picture.summary() if event in ("validation", "checkpoint") else _plain(line))
        if is_live:
            _draw(picture, drawn)
        status = client.post_training.job_status(job)
    reason = (status.resources_allocated or {}).get("reason")
    click.echo(f"{_plain(job)} is {status.status.value}" + (f": {_plain(str(reason))}" if reason else ""))
    return 0 if status.status is JobStatus.COMPLETED else 1


def _draw(picture: Picture, drawn: int) -> int:
    """Draw over the ``drawn`` lines of the last time; how many they are now."""
    columns, rows = shutil.get_terminal_size()
    lines = picture.lines(columns=columns, rows=min(rows - 1, 16))
    back = f"\x1b[{drawn}F" if drawn else ""
    sys.stdout.write(back + "".join(f"\x1b[2K{line}\n" for line in lines))
    sys.stdout.flush()
    return len(lines)


def _lines(client: Client, job: str, *, follow: bool) -> Iterator[str]:
    from llama_stack.client import chunks, whole

    if not follow:
        yield from whole(client.post_training.job_logs(job)).log_lines
        return
    with chunks(client.post_training.job_logs(job, follow=True)) as parts:
        for part in parts:
            yield from part.log_lines


def _plain(text: str) -> str:
    """The text without control characters, which could move the cursor or recolour the terminal."""
    return "".join(mark if mark.isprintable() else "\ufffd" for mark in text)
