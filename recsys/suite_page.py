"""What a suite reached, to read: one self-contained HTML page, and Markdown."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib import resources
from string import Template
from textwrap import fill

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtower.recsys.chart import Line, key, line_chart
from fedtower.recsys.markup import Markup, join, tag
from fedtower.recsys.page import section, table
from fedtower.recsys.suite import TOTALS, Column, Layout, Plot
from fedtower.recsys.suite_figures import Results, Row
from fedtower.recsys.units import figure, in_bytes, in_count, in_seconds

HOW = (
    "Mean over seeds, and after ± the standard deviation. A difference, told by its sign, is taken seed by seed; p is "
    "of a two-sided paired t-test, and nothing is said of one seed. Published figures are those of the source named."
)


def render_suite(results: Results) -> str:
    """The page, whole."""
    main = [
        [_table(results, layout) for layout in results.layouts],
        _plots(results),
        _failures(results),
        _runs(results),
    ]
    body = [tag("header", tag("h1", results.suite.title), _head(results)), tag("main", main)]
    template = Template(resources.files("fedtower.recsys").joinpath("report.html").read_text("utf-8"))
    return template.substitute(title=join(f"{results.suite.title} – fedtower"), body=join(body))


def in_markdown(results: Results) -> str:
    """The tables, in Markdown."""
    lines = [f"# {results.suite.title}", "", *_about(results), ""]
    for layout in results.layouts:
        out = io.StringIO()
        Console(file=out, width=1000, color_system=None).print(_markdown_table(results, layout))
        lines += [
            f"## {layout.title}",
            "",
            *(line.rstrip() for line in out.getvalue().splitlines() if line.strip()),
            "",
        ]
        lines += [f"{note}\n" for note in _notes(results, layout)]
    return "\n".join([*lines, HOW, ""])


def console_table(results: Results, layout: Layout) -> Table:
    """One table, for a terminal: what belongs to a figure is under it, and only the entries' titles are folded."""
    rows = results.table(layout)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("")
    stacks = [[_stack(column, row) for row in rows] for column in layout.all_columns]
    for column, cells in zip(layout.all_columns, stacks, strict=True):
        width = max((len(line) for cell in cells for line in cell), default=0)
        shown.add_column(fill(column.head, max(width, 8)), justify="right", no_wrap=True)
    for row, *cells in zip(rows, *stacks, strict=True):
        shown.add_row(Text(row.entry.words), *(Text("\n".join(cell)) for cell in cells))
    return shown


def _stack(column: Column, row: Row) -> list[str]:
    return [_spread(column, row), *(part for line in _under(column, row) for part in line.split(" ", 1))]


def _markdown_table(results: Results, layout: Layout) -> Table:
    """One table, for Markdown: a column for everything."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("")
    for head in _heads(results, layout):
        shown.add_column(head, justify="right")
    for row in results.table(layout):
        shown.add_row(Text(row.entry.words), *(Text(cell) for cell in _cells(results, layout, row)))
    return shown


def in_words(column: Column, value: float | None) -> str:
    """One figure with its unit.

    >>> in_words(Column("bytes_up"), 2_000_000), in_words(Column("accuracy", 0.97), 12.25), in_words(Column("AUC"), 0.7)
    ('2.0 MB', '12.2', '0.700')
    """
    if value is None:
        return "–"
    if column.reach is not None:
        return f"{value:.1f}"
    return _unit(column.of)(value)


def _unit(name: str) -> Callable[[float], str]:
    if name.startswith("bytes"):
        return in_bytes
    return {"seconds": in_seconds, "rounds": in_count}.get(name, figure)


def _about(results: Results) -> list[str]:
    seeds = sorted({run.seed for run in results.runs})
    protocols = dict.fromkeys(run.protocol for run in results.runs if run.protocol)
    numbers = ", ".join(map(str, seeds)) or "none yet"
    said = [
        results.suite.about,
        f"{'Seed' if len(seeds) == 1 else 'Seeds'} {numbers}; judged by {' / '.join(protocols) or 'nothing yet'}.",
    ]
    if results.quick:
        said.append("This is the quick form, of minutes: fewer seeds, rounds or entries than the suite itself has.")
    if len(results.runs) < results.planned:
        said.append(f"{len(results.runs)} of {results.planned} runs are done; the same command goes on.")
    return [line for line in said if line]


def _head(results: Results) -> list[Markup]:
    return [tag("p", line) for line in (*_about(results), HOW)]


def _heads(results: Results, layout: Layout) -> list[str]:
    heads = []
    for column in layout.all_columns:
        heads.append(column.head)
        if _has_published(results, layout, column):
            heads.append("published")
        if _has_differences(results, layout, column):
            heads.append("diff.")
        if _has_fewer(results, layout, column):
            heads.append("times fewer")
    return heads


def _cells(results: Results, layout: Layout, row: Row) -> list[str]:
    cells = []
    for column in layout.all_columns:
        cells.append(_spread(column, row))
        if _has_published(results, layout, column):
            cells.append(_published(column, row) or "–")
        if _has_differences(results, layout, column):
            cells.append(_apart(column, row) or "–")
        if _has_fewer(results, layout, column):
            cells.append(_times(column, row) or "–")
    return cells


def _under(column: Column, row: Row) -> list[str]:
    """What stands under a figure: the published one, and how far it is from what it is held against."""
    published, apart, times = _published(column, row), _apart(column, row), _times(column, row)
    said = [f"published {published}" if published else "", apart, f"{times} times fewer" if times else ""]
    return [line for line in said if line]


def _spread(column: Column, row: Row) -> str:
    spread = row.figures.get(column.key)
    if spread is None:
        return "never" if row.never.get(column.key) else "failed" if row.failed and row.failed == row.runs else "–"
    said = in_words(column, spread.mean)
    if spread.count > 1 and column.of not in TOTALS:
        said += f" ± {in_words(column, spread.deviation)}"
    never = row.never.get(column.key)
    return said + (f" ({never} never)" if never else "")


def _published(column: Column, row: Row) -> str:
    value = row.entry.published.get(column.key)
    if value is None:
        return ""
    return f"{value:g}" if column.reach is not None else in_words(column, value)  # whole rounds, if they are


def _apart(column: Column, row: Row) -> str:
    apart = row.differences.get(column.key)
    if apart is None or column.of in TOTALS:
        return ""
    said = f"{'+' if apart.mean >= 0 else '−'}{in_words(column, abs(apart.mean))}"
    return said + ("" if apart.p is None else f" (p {apart.p:.2g})")


def _has_published(results: Results, layout: Layout, column: Column) -> bool:
    return any(column.key in row.entry.published for row in results.table(layout))


def _has_differences(results: Results, layout: Layout, column: Column) -> bool:
    return column.of not in TOTALS and any(column.key in row.differences for row in results.table(layout))


def _has_fewer(results: Results, layout: Layout, column: Column) -> bool:
    return any(_times(column, row) for row in results.table(layout))


def _times(column: Column, row: Row) -> str:
    return "" if row.fewer is None or column.key != "bytes_up" else f"{row.fewer:.3g}"


def _notes(results: Results, layout: Layout) -> list[str]:
    rows = results.table(layout)
    sources: dict[str, list[str]] = {}
    for row in rows:
        if row.entry.source:
            sources.setdefault(row.entry.source, []).append(row.entry.words)
    said = [layout.note] if layout.note else []
    said += [f"Differences: {against}."] if (against := _against(results, rows)) else []
    if len(sources) == 1:
        return [*said, f"Published: {next(iter(sources))}."]
    by_source = [f"{source} ({'; '.join(names)})" for source, names in sources.items()]
    return said + ([f"Published: {'. '.join(by_source)}."] if sources else [])


def _against(results: Results, rows: Sequence[Row]) -> str:
    """Which rows are held against which entry; where there is but one such entry, that one."""
    held = [row for row in rows if row.differences]
    others = dict.fromkeys(row.entry.against for row in held)
    words = {name: results.suite.entry(name).words for name in others}
    if len(words) == 1:
        return f"from {next(iter(words.values()))}"
    each = {name: ", ".join(row.entry.words for row in held if row.entry.against == name) for name in words}
    return "; ".join(f"{each[name]} against {words[name]}" for name in words)


def _table(results: Results, layout: Layout) -> Markup:
    rows = results.table(layout)
    best = _best(rows, layout)
    drawn = []
    for row in rows:
        cells = []
        for index, column in enumerate(layout.all_columns):
            spread = row.figures.get(column.key)
            is_best = spread is not None and best[index] is not None and spread.mean == best[index] and len(rows) > 1
            under = [tag("small", line) for line in _under(column, row)]
            cells.append(tag("td", _spread(column, row), under, class_="best" if is_best else None))
        drawn.append(tag("tr", tag("th", row.entry.words, scope="row"), cells))
    notes = [tag("p", note, class_="muted") for note in _notes(results, layout)]
    return section(layout.title, table(["", *(column.head for column in layout.all_columns)], drawn), notes)


def _best(rows: Sequence[Row], layout: Layout) -> list[float | None]:
    found: list[float | None] = []
    for column in layout.all_columns:
        values = [spread.mean for row in rows if (spread := row.figures.get(column.key)) is not None]
        of = min if column.less_is_better else max
        found.append(of(values) if len(set(values)) > 1 and column.of not in TOTALS else None)
    return found


def _plots(results: Results) -> Markup | None:
    drawn = [figure for plot in results.suite.plots if (figure := _plot(results, plot)) is not None]
    return section("Plots", tag("div", drawn, class_="charts")) if drawn else None


def _plot(results: Results, plot: Plot) -> Markup | None:
    lines = [Line(title, points) for title, points in results.curves(plot)]
    if not lines:
        return None
    x_format = None if plot.x == "rounds" else _unit(plot.x)
    x_name = "round" if plot.x == "rounds" else TOTALS.get(plot.x, plot.x)
    drawing = line_chart(lines, name=plot.y, x_name=x_name, y_format=_unit(plot.y), x_format=x_format)
    legend = [tag("span", key(place), " ", line.label) for place, line in enumerate(lines)]
    return tag("figure", tag("h3", plot.title), tag("p", [[each, " "] for each in legend], class_="legend"), drawing)


def _failures(results: Results) -> Markup | None:
    failed = [run for run in results.runs if run.error]
    notes = [tag("p", f"{run.entry}, seed {run.seed}: {run.error}", class_="note") for run in failed]
    return section("Runs that failed", *notes) if notes else None


def _runs(results: Results) -> Markup:
    rows = [
        tag("tr", tag("th", run.entry, scope="row"), tag("td", run.seed), tag("td", run.folder or "failed"))
        for run in results.runs
    ]
    shown = table(["entry", "seed", "run folder"], rows, words=True)
    return section(
        "Runs", tag("details", tag("summary", f"{len(results.runs)} run{'s' * (len(results.runs) != 1)}"), shown)
    )
