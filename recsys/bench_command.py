"""``fedtower bench``: run a suite, and write what it reached."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedtower.core.checkpoint import storage_errors
from fedtower.core.cli import pass_registry
from fedtower.core.errors import FedtowerError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.round import RoundReport
from fedtower.recsys.bench import Bench
from fedtower.recsys.run_folder import RunFolder
from fedtower.recsys.suite import Column, Suite, Task, load_suite, tasks_of
from fedtower.recsys.suite_figures import Finished, Results
from fedtower.recsys.suite_page import console_table, in_markdown, in_words, render_suite


class RunsFailed(FedtowerError):
    """Some runs of a suite failed; what each said is in its results."""


@click.command()
@click.argument("name", metavar="[SUITE]", required=False)
@click.option("--quick", is_flag=True, help="The suite's quick form: minutes on a laptop.")
@click.option("--seeds", metavar="N,N,...", help="These seeds instead of the suite's.")
@click.option("--only", multiple=True, metavar="ENTRY", help="This entry; may be repeated.")
@click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="For every run; may be repeated.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to; default: bench/SUITE or bench/SUITE-quick."
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@pass_registry
def bench(
    registry: Registry,
    name: str | None,
    quick: bool,
    seeds: str | None,
    only: tuple[str, ...],
    options: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Run a suite of recipes over seeds, and lay their figures side by side.

    What is done already is not run again, and a run that was stopped goes on: after an interruption, give the same
    command. Results are in DIR: results.json, results.md and report.html, of all that is finished there with the same
    options, whatever --only and --seeds choose to run.

    \b
    Examples:
      fedtower bench                      (lists the suites)
      fedtower bench movielens --quick
      fedtower bench mnist --only fedavg-2nn-c01 --seeds 1,2,3,4,5
    """
    if name is None:
        _list(registry)
        return
    suite = load_suite(name, registry)
    tasks = tasks_of(suite, registry, quick=quick, seeds=_seeds(seeds), only=only, options=options)
    folder = out or Path("bench") / (f"{name}-quick" if quick else name)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, stderr=as_json)
    running = Bench(suite, folder, registry)
    finished: list[Finished] = []
    with RunFolder(folder).locked(), Shown(console, suite) as shown:
        beside = running.beside(tasks, quick=quick, options=options)
        results = Results(name, suite, quick, tuple(beside), len(beside) + len(tasks))
        for run in running.runs(tasks, shown):
            finished.append(run)
            results = replace(results, runs=(*results.runs, run))
            _write(folder, results)
    if as_json:
        click.echo(json.dumps(results.to_dict()))
    else:
        for layout in results.layouts:
            console.print(f"\n{layout.title}", style="bold")
            console.print(console_table(results, layout))
        console.print(f"\nreport: {folder / 'report.html'}", soft_wrap=True)
    failed = [run for run in finished if run.error]
    if failed:
        raise RunsFailed(
            f"{len(failed)} of {len(finished)} runs failed, the first of them {failed[0].entry} with seed "
            f"{failed[0].seed}: {failed[0].error}. The same command tries them again"
        )


class Shown:
    """Shows a suite as it goes: a bar for the rounds of the run, and a line for every run that has ended."""

    def __init__(self, console: Console, suite: Suite) -> None:
        self._console = console
        self._suite = suite
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._running = self._bar.add_task("", visible=False)

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begins(self, task: Task, number: int, count: int) -> Iterable[object]:
        """Show that a run begins, and watch its rounds."""
        said = f"{number} of {count}: {task.name}"
        self._bar.reset(self._running, total=task.recipe.planned, description=said, visible=True)
        return [self]

    @hookimpl
    def round_finished(self, report: RoundReport) -> None:
        """Move the bar."""
        self._bar.update(self._running, completed=report.round)

    def ended(self, task: Task, finished: Finished, number: int, count: int, *, before: bool) -> None:
        """A line about a run."""
        done = "failed" if finished.error else "done before" if before else "done"
        figures = "; ".join(
            f"{each.head} {in_words(each, finished.figures.get(each.key))}" for each in self._headline(finished)
        )
        self._console.print(
            f"{number} of {count}: {task.name} {done}: {figures or finished.error}",
            soft_wrap=True,
        )

    def _headline(self, finished: Finished) -> list[Column]:
        layouts = [each for each in self._suite.tables if not each.entries or finished.entry in each.entries]
        columns = {column.key: column for layout in layouts for column in layout.all_columns}
        return [column for key, column in columns.items() if key in finished.figures][:3]


def _write(folder: Path, results: Results) -> None:
    with storage_errors(folder):
        for file, text in (
            ("results.json", json.dumps(results.to_dict(), indent=1) + "\n"),
            ("results.md", in_markdown(results)),
            ("report.html", render_suite(results)),
        ):
            unfinished = folder / f".{file}"
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(folder / file)


def _seeds(said: str | None) -> list[int]:
    if said is None:
        return []
    try:
        return [int(seed) for seed in said.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"--seeds wants whole numbers, such as 1,2,3, not {said!r}") from error


def _list(registry: Registry) -> None:
    table = Table()
    table.add_column("suite", no_wrap=True)
    table.add_column("summary")
    for offer in registry.offers("suite"):
        table.add_row(offer.name, offer.summary)
    Console(highlight=False).print(table)
