"""What every command promises."""

from __future__ import annotations

import click
from click.testing import CliRunner

from fedtower.core.testing.promises import Promises


class CommandPromises(Promises):
    """``make`` gives the click command: ``make = lambda: my_command``."""

    def test_it_is_a_click_command(self) -> None:
        assert isinstance(self.made(), click.Command)

    def test_help_says_what_it_does_and_shows_an_example(self) -> None:
        for command in _leaves(self.made()):
            result = CliRunner().invoke(command, ["--help"], prog_name="fedtower")
            assert result.exit_code == 0, result.output
            assert "\\b" not in result.output, f"{command.name}: a raw docstring hides its \\b from click"
            assert len((command.help or "").split()) >= 3, f"{command.name} says nothing about itself"
            assert "fedtower " in (command.help or "") + (command.epilog or ""), f"{command.name} shows no example"

    def test_every_option_says_what_it_is_for(self) -> None:
        for command in _leaves(self.made()):
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert parameter.help, f"{command.name} {parameter.opts[0]} has no help"

    def test_an_unknown_option_is_refused(self) -> None:
        for command in _leaves(self.made()):
            assert CliRunner().invoke(command, ["--no-such-option"]).exit_code == 2


def _leaves(command: click.Command) -> list[click.Command]:
    """The command itself, or the subcommands of a group."""
    if isinstance(command, click.Group):
        return [leaf for child in command.commands.values() for leaf in _leaves(child)]
    return [command]
