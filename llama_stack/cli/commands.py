"""Which commands there are, and what every one of them has in common: exit codes and how an error is shown.

``--help`` must be quick, so nothing here imports a contract, a server or a plugin: a command's module is imported when
it is named and imports what it needs when it runs. Plugins name their commands in the entry-point group
``llama_stack.commands``, so that one without commands is not imported to find that out.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import click

from .. import __version__
from ..errors import DistributionError, StackError, nearest
from .output import error

if TYPE_CHECKING:
    from ..plugins import CommandSpec, Plugin

GROUP = "llama_stack.commands"

DONE = 0
REFUSED = 1
INTERRUPTED = 130

_COMMANDS = (
    "run",
    "check",
    "explain",
    "install",
    "lock",
    "list",
    "schema",
    "chat",
    "complete",
    "new-plugin",
    "conformance",
    "version",
)


class Commands(click.Group):
    """The commands of the core, and those of installed plugins after them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *sorted(_plugin_entries())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            command: click.Command = importlib.import_module(f"{__package__}.{cmd_name.replace('-', '_')}").command
            return command
        entry = _plugin_entries().get(cmd_name)
        return None if entry is None else _load(entry)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            raise click.UsageError(f"no command is called {args[0]!r}{nearest(args[0], known)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [
            (name, command.get_short_help_str(60)) for name in _COMMANDS if (command := self.get_command(ctx, name))
        ]
        # What a plugin says of its command is told by the command itself: finding it out would import the plugin.
        rows += [(name, f"A command of {_package(entry)}.") for name, entry in sorted(_plugin_entries().items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process: 0 done, 1 refused, 2 misuse, 130 interrupted."""
    sys.exit(_outcome(sys.argv[1:] if arguments is None else list(arguments)))


def _outcome(arguments: list[str]) -> int:
    try:
        try:
            code = _ROOT.main(arguments, prog_name="llama-stack", standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as misuse:
            click.echo(misuse.format_message())
            code = DONE
        except click.ClickException as misuse:
            misuse.show()
            code = misuse.exit_code
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except DistributionError as refused:
        for problem in refused.problems:
            error(problem)
        return REFUSED
    except StackError as refused:
        error(str(refused))
        return REFUSED
    except OSError as failure:
        if failure.errno not in (errno.EPIPE, errno.ENOSPC) or failure.filename is not None:
            raise
        if failure.errno == errno.ENOSPC:  # of a pipe that nobody reads on, click says nothing either
            error("the output cannot be written: there is no space left")
        # The interpreter flushes once more at its end: not aloud.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    return code if isinstance(code, int) else DONE


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="llama-stack %(version)s")
def _ROOT() -> None:
    """Serve and use a Llama model with everything around it."""


def _plugin_entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in _COMMANDS}


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "unknown package"


def _declared(entry: EntryPoint) -> tuple[Plugin, CommandSpec]:
    from .. import plugins

    package = _package(entry)
    plugin = plugins.Plugin((entry.name,), package, entry.value, entry)
    for spec in plugins.load(plugin):
        if isinstance(spec, plugins.CommandSpec) and spec.name == entry.name:
            return plugin, spec
    raise plugin.fault(
        f"it names the command {entry.name!r} and declares none of that name", f"report it to the authors of {package}"
    )


def _load(entry: EntryPoint) -> click.Command:
    plugin, spec = _declared(entry)
    try:
        return spec.load()
    except Exception as cause:
        what = f"importing {spec.target} raised {type(cause).__name__}: {cause}"
        raise plugin.fault(what, f"install what {plugin.package} requires, or uninstall it") from cause
