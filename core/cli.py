"""The command host: ``fedtower``, whose subcommands come in by a door like anything else and are imported when used."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import click

from fedtower.core.discovery import Gate, split_names
from fedtower.core.errors import DISK_ERRORS, FedtowerError, MissingDependency, PluginError, StorageError, nearest
from fedtower.core.garbage import begin_program
from fedtower.core.offers import HOST, how_to_install
from fedtower.core.registry import Registry, discover

EXIT_CODES = """
\b
Exit codes:
  0    done
  1    an unexpected error: a bug in fedtower or in a plugin
  2    the command line or the recipe: a misspelt key, an unknown part
  3    the data: missing, broken, or a leak of held-out items
  4    a plugin is broken, blocked, or a second of its name
  5    a checkpoint or run folder is damaged
  6    the disk: read-only, full, or no permission
  7    a library is missing
  8    a client's update cannot be used
  9    the model's scores are not numbers: the training diverged
  10   a signature, a certificate, a key or a token is not to be trusted
  11   the server cannot be reached
  12   a server's process cannot be kept running
  130  interrupted
"""

pass_registry = click.make_pass_decorator(Registry)
"""Gives a command the registry as its first argument."""


class Commands(click.Group):
    """The offered commands. Help is made of their summaries: nothing of a command is imported before it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return [offer.name for offer in registry_of(ctx).offers("command")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = registry_of(ctx).load("command", cmd_name)
        if not isinstance(command, click.Command):
            offer = registry_of(ctx).get("command", cmd_name)
            raise PluginError(
                f"{offer.target} of {offer.origin} must be a click.Command, but is {type(command).__name__}"
            )
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is meant, or a usage error with the nearest name."""
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            raise click.UsageError(f"there is no command {args[0]!r}{nearest(args[0], names)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and summaries, as offered."""
        offers = registry_of(ctx).offers("command")
        with formatter.section("Commands"):
            formatter.write_dl([(offer.name, offer.summary) for offer in offers])


def registry_of(ctx: click.Context) -> Registry:
    """The registry of this command line, made when it is first asked for."""
    root = ctx.find_root()
    if not isinstance(root.obj, Registry):
        gates = [
            Gate("--plugins-allow", allow=split_names(root.params.get("plugins_allow") or ())),
            Gate("--plugins-block", block=split_names(root.params.get("plugins_block") or ())),
        ]
        root.obj = discover(gates, folder=Path.cwd())
    return root.obj


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"fedtower {metadata.version('fedtower')}")
        ctx.exit()


# Eager, like --help: the help lists the commands of the plugins that these let in.
@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--plugins-allow", multiple=True, is_eager=True, metavar="NAMES", help="Of other people's plugins, only these."
)
@click.option("--plugins-block", multiple=True, is_eager=True, metavar="NAMES", help="None of these plugins.")
@click.pass_context
def fedtower(ctx: click.Context, debug: bool, plugins_allow: Sequence[str], plugins_block: Sequence[str]) -> None:
    """Train recommenders on data that stays where it is.

    \b
    Begin with:
      fedtower run dssm-synthetic
    """
    registry_of(ctx)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and exit with its code."""
    begin_program()
    sys.exit(call(sys.argv[1:] if arguments is None else arguments))


def call(arguments: Sequence[str]) -> int:
    """Run one command line and give back its exit code; an error is one paragraph on stderr."""
    debug = "--debug" in arguments
    try:
        result: Any = fedtower.main(list(arguments), prog_name="fedtower", standalone_mode=False)
    except click.Abort as stop:
        return _interrupted(stop)
    except click.ClickException as error:
        return _refused(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _failed(error, arguments)
    return result if isinstance(result, int) else 0


def _refused(error: click.ClickException) -> int:
    """A command line that click cannot read; a group without a subcommand only shows its help."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(error.format_message())
        return 0
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedtower"
    say(f"error: {error.format_message().rstrip('.')}; `{command} --help` shows what there is")
    return error.exit_code


def _failed(error: Exception, arguments: Sequence[str]) -> int:
    known = as_known(error)
    if known is not None:
        if not known.is_told:
            say(f"error: {known}")
        return known.exit_code
    where = traceback.extract_tb(error.__traceback__)[-1]
    again = shlex.join(["fedtower", "--debug", *(word for word in arguments if word != "--debug")])
    say(
        f"error: {type(error).__name__}: {error} (at {where.filename}:{where.lineno}). This is a bug in fedtower "
        f"or in a plugin; `{again}` shows the traceback that its author will want to see."
    )
    return 1


def as_known(error: Exception) -> FedtowerError | None:
    """The error as one of ours: itself, a refusal of the disk, or a library that is not there; ``None`` for a bug.

    >>> import errno
    >>> as_known(OSError(errno.ENOSPC, "No space left on device", "runs/a-1/log.jsonl"))
    StorageError('runs/a-1/log.jsonl: the disk is full; free some space')
    """
    if isinstance(error, FedtowerError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return StorageError(f"{error.filename or 'a file'}: {DISK_ERRORS[error.errno]}")
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != HOST:
        missing = error.name.partition(".")[0]
        return MissingDependency(f"this needs {missing}, which is not installed; {how_to_install(missing, HOST)}")
    return None


def say(paragraph: str) -> None:
    """Print a paragraph on stderr, wrapped at the width of the terminal."""
    width = shutil.get_terminal_size().columns
    # A long path that comes first stays on the line of "error:", whatever the width.
    glued = paragraph.replace(": ", ":\xa0", 1)
    filled = textwrap.fill(glued, width, break_long_words=False, break_on_hyphens=False)
    click.echo(filled.replace(":\xa0", ": ", 1), err=True)


def _interrupted(stop: click.Abort) -> int:
    """Whoever was interrupted may have left a note on how to go on."""
    say("; ".join(["interrupted", *getattr(stop.__cause__, "__notes__", ())]))
    return 130
