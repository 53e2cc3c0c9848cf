"""The command host: quick help, one-paragraph errors, documented exit codes, and no traceback that nobody asked for."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import pytest

from fedtower.core import cli, errors
from fedtower.core.registry import Registry, discover

HEAVY = ("torch", "torchrec", "pandas", "pyarrow", "rich", "pytest")


def run(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fedtower", *words], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Make a function the command ``try``."""

    def make(function: Callable[[], object]) -> None:
        module = ModuleType("commands_of_a_test")
        module.command = click.command("try")(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

        def with_try(*args: object, **kwargs: object) -> Registry:
            registry = discover()
            registry.command("try", "commands_of_a_test:command", summary="one for a test")
            return registry

        monkeypatch.setattr(cli, "discover", with_try)

    return make


def raising(error: BaseException) -> Callable[[], object]:
    def function() -> None:
        raise error

    return function


def test_help_lists_the_commands_without_importing_them() -> None:
    program = (
        "import sys; from fedtower.core.cli import call; code = call(['--help']);"
        f"print('loaded', [name for name in {HEAVY} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded [] 0"
    for command in ("run", "resume", "report", "plugins", "doctor"):
        assert re.search(rf"^  {command} +\w", done.stdout, flags=re.MULTILINE)


def test_listing_plugins_imports_no_torch() -> None:
    program = (
        "import sys; from fedtower.core.cli import call; call(['plugins', 'list']);"
        "print('loaded', [name for name in ('torch', 'torchrec', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_every_exit_code_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["--help"]) == 0
    documented = {int(code) for code in re.findall(r"^  +(\d+)  ", capsys.readouterr().out, flags=re.MULTILINE)}
    kinds = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FedtowerError)}
    assert kinds | {0, 130} <= documented


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call([]) == 0
    assert "Begin with:" in capsys.readouterr().out


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    import fedtower

    assert cli.call(["--version"]) == 0
    assert capsys.readouterr().out == f"fedtower {fedtower.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "error: there is no command 'rnu' (did you mean 'run'?); `fedtower --help` shows what there is\n"),
        (["--nope"], "error: No such option '--nope'; `fedtower --help` shows what there is\n"),
        (["plugins", "show"], "error: Missing argument 'NAME'; `fedtower plugins show --help` shows what there is\n"),
    ],
)
def test_a_command_line_that_cannot_be_read(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.call(words) == 2
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.DataError("line 3 is broken"), 3, "error: line 3 is broken\n"),
        (errors.CheckpointError("half of it is missing"), 5, "error: half of it is missing\n"),
        (OSError(errno.ENOSPC, "x", "runs/a"), 6, "error: runs/a: the disk is full; free some space\n"),
        (OSError(errno.EROFS, "x", "runs"), 6, "error: runs: the file system is read-only; choose another folder\n"),
        (PermissionError(errno.EACCES, "x"), 6, "error: a file: there is no permission to do that"),
        (
            ModuleNotFoundError("x", name="torch.nn"),
            7,
            "error: this needs torch, which is not installed; `pip install 'fed",
        ),
        (ModuleNotFoundError("x", name="fedtower.gone"), 1, "error: ModuleNotFoundError: x (at "),
        (ZeroDivisionError("oh"), 1, "error: ZeroDivisionError: oh (at "),
    ],
)
def test_an_error_is_one_paragraph_and_a_code(
    error: Exception,
    code: int,
    message: str,
    offer: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    offer(raising(error))
    assert cli.call(["try"]) == code
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1
    if code == 1:
        assert "a bug in fedtower or in a plugin; `fedtower --debug try` shows the traceback" in said


def test_debug_shows_the_traceback(
    offer: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    offer(raising(errors.DataError("line 3 is broken")))
    assert cli.call(["--debug", "try"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_errors_are_wrapped_at_the_width_of_the_terminal(
    offer: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    offer(raising(errors.DataError("a word " * 30)))
    cli.call(["try"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 4
    assert max(map(len, lines)) <= 40


def test_an_interruption_passes_on_how_to_go_on(
    offer: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop = KeyboardInterrupt()
    stop.add_note("`fedtower resume runs/a-1` goes on")
    offer(raising(stop))
    assert cli.call(["try"]) == 130
    assert "interrupted; `fedtower resume runs/a-1` goes on" in capsys.readouterr().err


def test_an_interruption_without_a_note_is_just_said(
    offer: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    offer(raising(KeyboardInterrupt()))
    assert cli.call(["try"]) == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


def test_a_command_may_set_its_own_code(offer: Callable[[Callable[[], object]], None]) -> None:
    offer(lambda: click.get_current_context().exit(4))
    assert cli.call(["try"]) == 4


def test_what_is_offered_as_a_command_must_be_one(
    offer: Callable[[Callable[[], object]], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(lambda: None)
    monkeypatch.setattr(sys.modules["commands_of_a_test"], "command", print)
    assert cli.call(["try"]) == 4
    assert "must be a click.Command" in capsys.readouterr().err


def test_flags_keep_plugins_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["--plugins-block", "recsys", "--help"]) == 0
    assert "doctor" not in capsys.readouterr().out
    assert cli.call(["--plugins-block", "recsis", "--help"]) == 4
    assert "--plugins-block names the plugin 'recsis'" in capsys.readouterr().err


def test_a_projects_own_plugins_count_where_the_command_is_typed(tmp_path: Path) -> None:
    (tmp_path / "fedtower_plugins.py").write_text(
        "import click\n"
        "from fedtower.core.hooks import hookimpl\n"
        "@click.command()\n"
        "def hello():\n    click.echo('hello from here')\n"
        "@hookimpl\n"
        "def fedtower_register(registry):\n"
        "    registry.command('hello', 'fedtower_plugins:hello', summary='say hello')\n"
    )
    assert run("hello", folder=tmp_path).stdout == "hello from here\n"
