"""Display: a run as it goes, on a terminal or in a file.

On a terminal there is one live line (a bar, the loss, the time that is left) under a table, 78 columns wide. In a file
or a pipe there are plain lines. In a run of at most 40 rounds, or with ``verbose``, every round has a row; in a longer
one the first and the last, those that were evaluated, and the first in which clients were dropped.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtower.core.hooks import hookimpl
from fedtower.core.recipe import Recipe
from fedtower.core.round import RoundReport
from fedtower.recsys.evaluation import Evaluation
from fedtower.recsys.units import figure, in_bytes, in_count, in_percent, in_seconds

ROWS_FOR_ALL = 40
"""Up to so many rounds, each has a row: more do not fit on a screen."""

_WIDTHS = {"round": 9, "loss": 7, "metric": 8, "clients": 7, "dropped": 7, "up": 8, "down": 8, "time": 8}


class Display:
    """Shows the rounds of one run; an observer of it, and a context that gives the terminal back as it was.

    Args:
        console: Where to; what it is decides between a live line and plain lines.
        verbose: A row for every round, however many there are.
        clock: Seconds, for the time that is left.
    """

    def __init__(
        self, console: Console | None = None, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(highlight=False)
        self.verbose = verbose
        self._clock = clock
        self._live: Live | None = None
        self._unit = "round"
        self._shown_metrics: tuple[str, ...] = ()
        self._pending: RoundReport | None = None
        self._latest: RoundReport | None = None
        self._figures: Mapping[str, float] = {}
        self._started: tuple[float, int] | None = None
        self._has_heading = False
        self._has_dropped = False

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Told by the run

    @hookimpl
    def run_started(self, recipe: Recipe, folder: Path) -> None:
        self._unit = "epoch" if recipe.mode == "standalone" else "round"
        self._started = None
        if self.console.is_terminal and self._live is None:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True, get_renderable=self._line)
            self._live.start()

    @hookimpl
    def run_resumed(self, round: int) -> None:
        self.say(f"going on after {self._unit} {round}")

    @hookimpl
    def data_loaded(self, card: Mapping[str, Any], headline: tuple[str, ...]) -> None:
        self._shown_metrics = headline
        self.say(in_words(card))

    @hookimpl
    def round_started(self, round: int) -> None:
        self._print_pending()
        if self._started is None:
            self._started = (self._clock(), round)

    @hookimpl
    def round_finished(self, report: RoundReport) -> None:
        self._print_pending()
        self._pending = self._latest = report

    @hookimpl
    def evaluated(self, subject: str, evaluation: Evaluation) -> None:
        # The figures on the test data, and the baseline's, are shown together when the run has ended.
        if subject == "model" and evaluation.role == "validation":
            self._figures = evaluation.metrics
            self._print_pending(evaluation.metrics)

    @hookimpl
    def deadline_changed(self, why: str) -> None:
        self._print_pending()
        self.say(why)

    @hookimpl
    def warned(self, message: str) -> None:
        self._print_pending()
        said = Text(fitted(self.console, f"warning: {message}"))
        said.stylize("bold yellow", 0, len("warning:"))
        self.console.print(said, soft_wrap=True)

    @hookimpl
    def run_finished(self) -> None:
        self.close()

    # Told by the program

    def say(self, message: str) -> None:
        """Print a line, above the live one."""
        self.console.print(Text(fitted(self.console, message)), soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or the like, above the live line."""
        self.console.print(renderable)

    def close(self) -> None:
        """Print the round that turned out to be the last, and give the terminal back."""
        self._print_pending(is_last=True)
        if self._live is not None:
            self._live.stop()
            self._live = None

    # Rows

    def _print_pending(self, metrics: Mapping[str, float] | None = None, *, is_last: bool = False) -> None:
        report, self._pending = self._pending, None
        if report is None or not (self._has_row(report, metrics) or is_last):
            return
        if self.console.is_terminal:
            self._print_row(report, metrics or {})
        else:
            self._print_plain(report, metrics or {})

    def _has_row(self, report: RoundReport, metrics: Mapping[str, float] | None) -> bool:
        newly_dropped = report.dropped > 0 and not self._has_dropped
        self._has_dropped = self._has_dropped or newly_dropped
        at_an_end = report.round in (1, report.total_rounds)
        return self.verbose or report.total_rounds <= ROWS_FOR_ALL or bool(metrics) or at_an_end or newly_dropped

    def _print_row(self, report: RoundReport, metrics: Mapping[str, float]) -> None:
        if not self._has_heading:
            headings = [self._unit, "loss", *self._shown_metrics, "clients", "dropped", "up", "down", "time"]
            self.console.print(_row([(heading, "bold") for heading in headings]))
            self._has_heading = True
        cells = [
            (f"{report.round}/{report.total_rounds}", ""),
            (figure(report.loss), "" if math.isfinite(report.loss) else "red"),
            *((figure(metrics[name]) if name in metrics else "", "cyan") for name in self._shown_metrics),
            (in_count(report.clients), ""),
            (in_count(report.dropped), "yellow" if report.dropped else "dim"),
            (in_bytes(report.bytes_up), ""),
            (in_bytes(report.bytes_down), ""),
            (in_seconds(report.seconds), ""),
        ]
        self.console.print(_row(cells))

    def _print_plain(self, report: RoundReport, metrics: Mapping[str, float]) -> None:
        figures = "".join(f"  {name} {figure(metrics[name])}" for name in self._shown_metrics if name in metrics)
        self.say(
            f"{self._unit} {report.round}/{report.total_rounds}  loss {figure(report.loss)}{figures}  "
            f"clients {in_count(report.clients)}  dropped {in_count(report.dropped)}  up {in_bytes(report.bytes_up)}  "
            f"down {in_bytes(report.bytes_down)}  {in_seconds(report.seconds)}"
        )

    # The live line

    def _line(self) -> RenderableType:
        report = self._latest
        if report is None:
            return Text("")
        known = [name for name in self._shown_metrics[:1] if name in self._figures]
        line = Table.grid(padding=(0, 2), expand=True)
        cells: list[RenderableType] = [
            Text(f"{self._unit} {report.round}/{report.total_rounds}"),
            ProgressBar(total=report.total_rounds, completed=report.round),
            Text(f"loss {figure(report.loss)}"),
            *(Text(f"{name} {figure(self._figures[name])}", style="cyan") for name in known),
            Text(self._left(report), style="dim"),
        ]
        for cell in cells:
            line.add_column(ratio=1 if isinstance(cell, ProgressBar) else None, no_wrap=True)
        line.add_row(*cells)
        return Group(line)

    def _left(self, report: RoundReport) -> str:
        """How long the rest takes at the pace so far, evaluations included."""
        rest = report.total_rounds - report.round
        if self._started is None or rest <= 0:
            return ""
        began, first = self._started
        return f"{in_seconds(rest * (self._clock() - began) / max(report.round - first + 1, 1))} left"


def fitted(console: Console, text: str) -> str:
    """The same with lines that are broken between words where a terminal's would end, the rest indented further; as it
    is for a file or a pipe. A word that is longer than a line stays whole: it may be a path.
    """
    if not console.is_terminal:
        return text
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        broken = textwrap.wrap(
            line, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        lines += broken or [""]
    return "\n".join(lines)


def in_words(card: Mapping[str, Any]) -> str:
    """A data card (as plain values) in one line, and a line for each of its remarks.

    >>> print(in_words({"name": "small", "users": 4, "items": 50, "interactions": 60, "density": 0.3}))
    small: 4 users, 50 items, 60 interactions, density 30 %
    >>> print(in_words({"name": "digits", "clients": 10, "training examples": 6_000}))
    digits: 10 clients, 6,000 training examples
    """
    counts = ", ".join(f"{in_count(value)} {name}" for name, value in card.items() if isinstance(value, int))
    density = f", density {in_percent(card['density'])}" if "density" in card else ""
    first, last = (str(card.get(name) or "")[:10] for name in ("first_time", "last_time"))
    span = f", {first} to {last}" if first and last else ""
    remarks = "".join(f"\n  {name}: {remark}" for name, remark in card.get("extra", {}).items())
    return f"{card['name']}: {counts}{density}{span}{remarks}"


def index_in_words(figures: Mapping[str, Any]) -> str:
    """An index's figures, as ``summary.json`` holds them, in one line.

    >>> print(index_in_words({"name": "faiss", "items": 3706, "recall": 0.9941, "at": 10, "queries": 1000,
    ...                       "build_seconds": 0.13, "microseconds_a_query": 13.2, "bytes": 1_060_000}))
    faiss, 3,706 items: recall@10 0.994 against all scored (1,000 queries), 13.2 us a query, built in 0.13 s, 1.1 MB
    """
    found = f"recall@{figures['at']} {figure(figures['recall'])} against all scored"
    return (
        f"{figures['name']}, {in_count(figures['items'])} items: {found} ({in_count(figures['queries'])} queries), "
        f"{figures['microseconds_a_query']:.3g} us a query, built in {in_seconds(figures['build_seconds'])}, "
        f"{in_bytes(figures['bytes'])}"
    )


def _row(cells: list[tuple[str, str]]) -> Text:
    """Cells flush right in columns of fixed width, so that a row can be printed without knowing the next."""
    metrics = len(cells) - (len(_WIDTHS) - 1)
    widths = [_WIDTHS["round"], _WIDTHS["loss"], *[_WIDTHS["metric"]] * metrics, *list(_WIDTHS.values())[3:]]
    return Text(" ").join(
        Text(text.rjust(width), style=style) for (text, style), width in zip(cells, widths, strict=True)
    )
