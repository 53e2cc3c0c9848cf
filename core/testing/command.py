"""What every command promises."""

from __future__ import annotations

import click
from click.testing import CliRunner

from fedtower.core.testing.promises import Promises

_COLUMNS = 80


class CommandPromises(Promises):
    """``make`` gives the click command: ``make = lambda: my_command``."""

    def test_it_is_a_click_command(self) -> None:
        assert isinstance(self.made(), click.Command)

    def test_help_says_what_it_does_and_shows_an_example(self) -> None:
        for command in _all(self.made()):
            result = CliRunner().invoke(command, ["--help"], prog_name="fedtower", terminal_width=_COLUMNS)
            assert result.exit_code == 0, result.output
            assert "\\b" not in result.output, f"{command.name}: a raw docstring hides its \\b from click"
            assert len((command.help or "").split()) >= 3, f"{command.name} says nothing about itself"
            assert "fedtower " in (command.help or "") + (command.epilog or ""), f"{command.name} shows no example"

    def test_help_fits_a_terminal_and_is_not_cut(self) -> None:
        for command in _all(self.made()):
            said = CliRunner().invoke(command, ["--help"], prog_name="fedtower", terminal_width=_COLUMNS).output
            wide = [line for line in said.splitlines() if len(line) > _COLUMNS]
            assert not wide, f"{command.name}: wider than {_COLUMNS} columns: {wide}"
            cut = [line for line in said.partition("\nCommands:")[2].splitlines() if line.endswith("...")]
            assert not cut, f"{command.name}: click cuts these summaries; give the commands a short_help: {cut}"

    def test_every_option_says_what_it_is_for(self) -> None:
        for command in _all(self.made()):
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert parameter.help, f"{command.name} {parameter.opts[0]} has no help"

    def test_an_unknown_option_is_refused(self) -> None:
        for command in _all(self.made()):
            assert CliRunner().invoke(command, ["--no-such-option"]).exit_code == 2


def _all(command: click.Command) -> list[click.Command]:
    """The command itself, and the subcommands of a group."""
    children = command.commands.values() if isinstance(command, click.Group) else ()
    return [command, *(each for child in children for each in _all(child))]
