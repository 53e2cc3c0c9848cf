"""``fedtower status``: how a served run stands, in a terminal or for a program."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedtower.core.cli import pass_registry
from fedtower.core.errors import CheckpointError, Unreachable
from fedtower.core.registry import Registry
from fedtower.recsys.process_log import FollowedLogs
from fedtower.recsys.run_folder import FEDERATION, RunFolder
from fedtower.recsys.status import Watched
from fedtower.recsys.units import figure, in_bytes, in_count, in_seconds

EVERY_SECONDS = 1.0
_MOST_BYTES = 4 << 20
_SECONDS = 10.0
_STYLES = {"finished": "green", "stopped": "bold red", "restarting": "bold red", "open": "cyan", "evaluating": "cyan"}

Told = Mapping[str, Any]


@click.command(name="status")
@click.argument("run", required=False, metavar="[RUN]", type=click.Path(path_type=Path))
@click.option("--server", metavar="HOST:PORT", help="Ask a server's live page instead of reading a folder.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where runs are, without RUN.",
)
@click.option("--watch", is_flag=True, help="Look again every second, until the run has ended.")
@click.option("--log", is_flag=True, help="What its processes have logged, by time; with --watch, as it comes.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for programs; with --watch, a line each time.")
@pass_registry
def status_command(
    registry: Registry, run: Path | None, server: str | None, runs: Path, watch: bool, log: bool, as_json: bool
) -> None:
    """Say how a run stands that is, or was, served to devices: rounds, devices, drop-outs, refusals, bytes, processes.

    RUN is its folder; without one it is the newest that was served. --server asks a server for the same, by the address
    of its live page (`fedtower serve` prints it).

    \b
    Examples:
      fedtower status
      fedtower status runs/dssm-ml-100k-1 --watch
      fedtower status --log --watch
      fedtower status --server 127.0.0.1:7434 --json
    """
    if server is not None:
        if run is not None or log:
            raise click.UsageError("give a RUN, or --server, whose page has no log")
        _show(lambda: asked(server), watch=watch, as_json=as_json)
        return
    folder = RunFolder.open(newest(runs) if run is None else run)
    registry.use_folder(folder.path)
    with closing(Watched(folder, registry)) as watched:
        if log:
            _show_log(folder.path, lambda: watch and not _is_over(watched.status().to_dict()), as_json=as_json)
            return
        _show(lambda: watched.status().to_dict(), watch=watch, as_json=as_json)


def newest(runs: Path) -> Path:
    """The run that was served last. Raises CheckpointError when none was."""
    served = sorted(runs.glob(f"*/{FEDERATION}"), key=lambda path: path.stat().st_mtime)
    if not served:
        raise CheckpointError(
            f"no run in {runs} was served to devices; name a RUN, or begin with `fedtower serve RECIPE`"
        )
    return served[-1].parent


def asked(server: str) -> Told:
    """What a server says of its run.

    Raises:
        Unreachable: nobody answers there, or not with a status.
    """
    url = server if "//" in server else f"http://{server}"
    if urlsplit(url).scheme not in ("http", "https"):
        raise click.UsageError(
            f"--server wants HOST:PORT, or the address that `fedtower serve` printed, not {server!r}"
        )
    url = f"{url.rstrip('/')}/status.json"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            told = json.loads(answer.read(_MOST_BYTES))
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise Unreachable(
            f"{url} does not say how a run stands ({why}); is that the address of a live page?"
        ) from error
    if not isinstance(told, dict) or not {"phase", "round", "devices"} <= told.keys():
        raise Unreachable(f"{url} answers, but not with the status of a run; the devices' port has none")
    return told


def _show(look: Callable[[], Told], *, watch: bool, as_json: bool) -> None:
    """Print what is seen, once or until the run has ended."""
    told, console = look(), Console(highlight=False)
    if as_json:
        click.echo(json.dumps(told, indent=None if watch else 1))
        while watch and not _is_over(told):
            time.sleep(EVERY_SECONDS)
            told = look()
            click.echo(json.dumps(told))
    elif not watch:
        console.print(pictured(told))
    else:
        with Live(pictured(told), console=console, auto_refresh=False) as live:
            while not _is_over(told):
                time.sleep(EVERY_SECONDS)
                told = look()
                live.update(pictured(told), refresh=True)


def _show_log(folder: Path, goes_on: Callable[[], bool], *, as_json: bool) -> None:
    """Print the lines that there are, and those that come until the run has ended."""
    logs, is_last = FollowedLogs(folder), False
    while True:
        for values in logs.new():
            click.echo(json.dumps(values) if as_json else logged_in_words(values))
        if is_last:
            return
        is_last = not goes_on()
        if not is_last:
            time.sleep(EVERY_SECONDS)


def logged_in_words(values: Told) -> str:
    """A line of a log: when, which process, how serious if it is, what, and the rest as it was named.

    >>> logged_in_words({"time": "2026-01-02T03:04:05.678+00:00", "process": "intake", "pid": 7, "level": "warning",
    ...                  "event": "refused", "round": 2, "reason": "norm", "message": "too long"})
    '2026-01-02 03:04:05.678 intake WARNING refused round=2 reason=norm too long'
    """
    about = {"time", "process", "pid", "level", "event", "message"}
    rest = [f"{name}={value}" for name, value in values.items() if name not in about and value is not None]
    level = str(values.get("level", "info")).upper()
    parts = (
        str(values.get("time", "")).replace("T", " ").partition("+")[0],
        values.get("process", "?"),
        *([] if level == "INFO" else [level]),
        values.get("event", ""),
        *rest,
        values.get("message", ""),
    )
    return " ".join(str(part) for part in parts).rstrip()


def _is_over(told: Told) -> bool:
    return told["phase"] in ("finished", "stopped")


def pictured(told: Told) -> RenderableType:
    """A status as tables of at most 80 columns."""
    about = Table(show_header=False, title=Text(str(told["folder"])), title_justify="left", width=80)
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    for name, value in _rows(told):
        about.add_row(name, value)
    if not told["windows"]:
        return about
    windows = Table("round", "task", "state", "updates", "why", title="windows", title_justify="left", width=80)
    for each in told["windows"]:
        cells = (str(each["round"]), each["task"], each["state"], in_count(each["accepted"]), each["reason"])
        windows.add_row(*map(Text, cells))
    return Group(about, windows)


def _rows(told: Told) -> list[tuple[str, Text]]:
    """What is said of each, where there is something to say."""
    devices, evaluation = told["devices"], told["evaluation"]
    rows: list[tuple[str, Text | str]] = [
        ("run", str(told["name"])),
        ("phase", Text(told["words"], style=_STYLES.get(told["phase"], ""))),
        ("rounds", f"{in_count(told['round'])} of {in_count(told['rounds'])} are done"),
        ("devices", f"{in_count(devices['there'])} are there; a round waits for {in_count(devices['needed'])}"),
        ("updates", f"{in_count(told['clients'])} counted; {_by(told['acknowledged'])} acknowledged"),
        ("dropped out", _by(told["dropped"])),
        ("refused", _by(told["refusals"])),
        ("bytes", f"{in_bytes(told['bytes_up'])} up, {in_bytes(told['bytes_down'])} down"),
        ("devices worked", _worked(told.get("work", {}))),
        ("loss", figure(told["loss"]) + (f" in round {told['round']}" if told["loss"] is not None else "")),
    ]
    if evaluation:
        figures = ", ".join(f"{name} {figure(value)}" for name, value in evaluation["metrics"].items())
        rows.append((str(evaluation["role"]), f"{figures} after round {evaluation['round']} ({evaluation['label']})"))
    rows += [("processes", _processes(told)), ("live page", str(told["page"]))]
    rows.append(("trouble", Text(str(told["trouble"]), style="bold red")))
    return [(name, value if isinstance(value, Text) else Text(value)) for name, value in rows if value]


def _worked(work: Mapping[str, float]) -> str:
    """How long, and for nothing; nothing where it is not known."""
    if not work.get("seconds"):
        return ""
    late = f"; {in_count(work['late'])} came when their round was over" if work["late"] else ""
    return f"{in_seconds(work['seconds'])}, of that {in_seconds(work['wasted'])} for nothing{late}"


def _by(counts: Mapping[str, int]) -> str:
    """Counts by what they are of: ``train 12, evaluate 4``; ``none`` where there are none."""
    return ", ".join(f"{name} {in_count(count)}" for name, count in counts.items()) or "none"


def _processes(told: Told) -> Text:
    parts = [
        Text(f"{each['name']} {each['pid']}" + ("" if each["alive"] else " (gone)"), "" if each["alive"] else "red")
        for each in told["processes"]
    ]
    return Text(", ").join(parts)
