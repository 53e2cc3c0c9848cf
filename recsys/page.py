"""The page of a report: sections of HTML about runs, a column or a line for each run.

What it tells is in ``Told``; where that comes from, and where the page goes to, is in ``report.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from string import Template
from typing import Any

from fedtower.recsys.chart import MOST_POINTS, Line, key, line_chart
from fedtower.recsys.markup import Markup, join, tag
from fedtower.recsys.runlog import RECIPE, Event, RowSelection, RunRecord
from fedtower.recsys.units import figure, in_bytes, in_count, in_percent, in_seconds, in_times


@dataclass(frozen=True)
class Told:
    """One run as the page tells of it."""

    label: str
    record: RunRecord
    recipe: str | None
    environment: Mapping[str, Any]

    @property
    def unit(self) -> str:
        """What the run counts: rounds, or in standalone mode epochs."""
        return "epoch" if self.record.started.get("mode") == "standalone" else "round"

    @property
    def way_on(self) -> str:
        """The command that goes on with the run: devices call a deployed one."""
        return "serve" if self.record.started.get("mode") == "deployed" else "resume"

    @property
    def planned(self) -> int:
        """How many rounds the run was to have."""
        return int(self.record.started.get("rounds", self.record.last_round))

    def figures(self, label: str, baseline: str | None = None) -> Mapping[str, float]:
        """The test figures by one protocol, of the model or of a baseline; empty where there are none."""
        events = self.record.final() if baseline is None else self.record.baselines
        chosen = [
            event
            for event in events
            if event.get("label") == label
            and (baseline is None or (event.get("name") == baseline and event.get("role") == "test"))
        ]
        return chosen[-1].get("metrics", {}) if chosen else {}

    def baseline(self, label: str) -> str:
        """What the model was held against by a protocol, such as ItemPop; empty where nothing was."""
        names = [str(event.get("name")) for event in self.record.baselines if event.get("label") == label]
        return names[-1] if names else ""


def render(runs: Sequence[Told]) -> str:
    """The page about these runs, whole."""
    name = str(runs[0].record.started.get("name", runs[0].label))
    title = name if len(runs) == 1 else f"{len(runs)} runs side by side"
    main = [
        [of(runs) for of in (_key_figures, _warnings, _figures, _curves)],
        tag("div", [_cost(runs), _data(runs), _retrieval(runs)], class_="beside"),
        [of(runs) for of in (_surroundings, _recipes)],
    ]
    body = [
        tag("header", tag("h1", title), _head(runs)),
        tag("main", main),
        tag("footer", _foot(runs)),
    ]
    template = Template(resources.files("fedtower.recsys").joinpath("report.html").read_text("utf-8"))
    return template.substitute(title=join(f"{title} – fedtower"), body=join(body))


# Sections. Each takes all runs; a column is a run.


def _head(runs: Sequence[Told]) -> list[Markup]:
    said: list[Markup] = []
    for position, run in enumerate(runs):
        started = run.record.started
        about = [
            *([tag("strong", key(position), run.label)] if len(runs) > 1 else []),
            *([started["name"]] if len(runs) > 1 and "name" in started else []),
            started.get("mode", "unknown mode"),
            f"seed {started.get('seed', 'unknown')}",
            _when(started.get("time")),
            f"{in_count(run.record.last_round)} {run.unit}{'' if run.record.last_round == 1 else 's'}",
        ]
        said.append(tag("p", [[tag("span", part), " "] for part in about], class_="about"))
        if run.record.finished is None:
            said.append(
                tag(
                    "p",
                    f"{run.label} is not finished: it stands at {run.unit} {in_count(run.record.last_round)} of "
                    f"{in_count(run.planned)}, and this page tells of it as far as it went. ",
                    tag("code", f"fedtower {run.way_on} {run.record.folder}"),
                    " goes on.",
                    class_="note",
                )
            )
    return said


def _key_figures(runs: Sequence[Told]) -> Markup | None:
    """The first figures of a single run, large."""
    labels = _labels(runs)
    if len(runs) != 1 or not labels:
        return None
    record, against = runs[0].record, runs[0].baseline(labels[0])
    ours, base = runs[0].figures(labels[0]), runs[0].figures(labels[0], against)
    tiles = []
    for name in record.first(ours)[:2]:
        beside = labels[0]
        if base.get(name):
            beside = (
                f"{ours[name] / base[name]:.2f} times {against}"
                if _is_share(name)
                else f"{against} {figure(base[name])}"
            )
        tiles.append((name, figure(ours[name]), beside))
    tiles.append(
        ("Time", in_seconds(record.total("seconds")), f"{_mean(record, 'seconds', in_seconds)} a {runs[0].unit}")
    )
    sent = record.total("bytes_up") + record.total("bytes_down")
    if sent:
        tiles.append(("Sent and fetched", in_bytes(sent), f"{_per_client(record)} a client and visit"))
    return tag(
        "dl",
        [tag("div", tag("dt", name), tag("dd", value), tag("dd", beside)) for name, value, beside in tiles],
        class_="tiles",
    )


def _figures(runs: Sequence[Told]) -> Markup:
    """A table for each protocol: the baseline, each run, and how two runs differ."""
    labels = _labels(runs)
    if not labels:
        return section("Test figures", tag("p", "No run here has been judged on its test data yet.", class_="muted"))
    remark = tag(
        "p",
        "Figures of different protocols cannot be compared with each other: with sampled negatives they are higher.",
        class_="muted",
    )
    return section(
        "Test figures",
        *([remark] if len(labels) > 1 else []),
        tag("div", [_protocol_table(runs, label) for label in labels], class_="tables"),
    )


def _protocol_table(runs: Sequence[Told], label: str) -> Markup:
    columns = [(run.label, run.figures(label)) for run in runs]
    baselines = _distinct([(run.label, run.figures(label, run.baseline(label))) for run in runs])
    against = next((run.baseline(label) for run in runs if run.baseline(label)), "")
    names = list(dict.fromkeys(name for _, figures in columns for name in figures))
    pair = len(runs) == 2 and all(figures for _, figures in columns)
    single = len(runs) == 1 and bool(baselines)
    shares = all(map(_is_share, names[:1]))
    heads = [
        "",
        *(against if len(baselines) == 1 else f"{against} ({of})" for of, _ in baselines),
        *_columns(runs),
        *(["difference"] if pair else []),
        *([f"times {against}"] if single and shares else ["difference"] if single else []),
    ]
    rows = []
    for name in names:
        values = [figures.get(name) for _, figures in columns]
        known = [value for value in values if value is not None]
        best = min if name.endswith("loss") else max
        cells = [tag("td", _exact(figures.get(name))) for _, figures in baselines]
        # Which of several runs is best is said by weight; of one, nothing is.
        cells += [
            tag("td", _exact(value), class_="best" if len(set(known)) > 1 and value == best(known) else None)
            for value in values
        ]
        if pair:
            cells.append(tag("td", _difference(values[0], values[1])))
        if single:
            base = baselines[0][1].get(name)
            times = f"{values[0] / base:.2f}" if base and values[0] is not None else "–"
            cells.append(tag("td", times if shares else _difference(base, values[0])))
        rows.append(tag("tr", tag("th", name, scope="row"), cells))
    judged = _judged(runs, label)
    return table(heads, rows, caption=f"Protocol: {label}{judged}")


def _curves(runs: Sequence[Told]) -> Markup:
    """Loss and validation figures over rounds; runs that count differently are drawn over their share."""
    units = {run.unit for run in runs}
    x_name = units.pop() if len(units) == 1 else "% of the run"
    scales = [100.0 / max(run.planned, 1) if x_name.startswith("%") else 1.0 for run in runs]

    def lines(events: Sequence[Sequence[Event]], value: Callable[[Event], float | None]) -> list[Line]:
        found = [
            [(event.get("round", 0) * scale, value(event)) for event in of]
            for of, scale in zip(events, scales, strict=True)
        ]
        known = [[(x, y) for x, y in points if y is not None] for points in found]
        return [Line(run.label, points) for run, points in zip(runs, known, strict=True)]

    judged = [[event for event in run.record.evaluations if event.get("role") == "validation"] for run in runs]
    metrics = dict.fromkeys(name for of in judged for event in of for name in event.get("metrics", {}))
    drawn = {"training loss": lines([run.record.rounds for run in runs], lambda event: event.get("loss"))}
    for name in dict.fromkeys(name for run in runs for name in run.record.first(metrics)):
        drawn[f"validation {name}"] = lines(judged, partial(_metric, name))
    figures = [
        tag(
            "figure",
            tag("h3", name[0].upper() + name[1:]),
            line_chart(of, name=name, x_name=x_name, y_format=figure),
            _drawn_from(of),
        )
        for name, of in drawn.items()
        if any(line.points for line in of)
    ]
    if not figures:
        return section("Learning curves", tag("p", "No round is finished yet.", class_="muted"))
    legend = tag("ul", [tag("li", key(position), run.label) for position, run in enumerate(runs)], class_="legend")
    return section("Learning curves", *([legend] if len(runs) > 1 else []), tag("div", figures, class_="charts"))


def _metric(name: str, event: Event) -> float | None:
    value = event.get("metrics", {}).get(name)
    return None if value is None else float(value)


def _drawn_from(lines: Sequence[Line]) -> Markup | None:
    """A remark where a point is more than one round."""
    longest = max(len(line.points) for line in lines)
    if longest <= MOST_POINTS:
        return None
    return tag("figcaption", f"Each point is the mean of {-(-longest // MOST_POINTS)} neighbouring values.")


def _cost(runs: Sequence[Told]) -> Markup:
    """Bytes, clients and time, in all and a round."""
    measures: list[tuple[str, Callable[[Told], str]]] = [
        (
            "rounds or epochs" if len({run.unit for run in runs}) > 1 else f"{runs[0].unit}s",
            lambda run: in_count(run.record.last_round),
        ),
        ("time", lambda run: in_seconds(run.record.total("seconds"))),
        ("time a round", lambda run: _mean(run.record, "seconds", in_seconds)),
        ("sent up", lambda run: in_bytes(run.record.total("bytes_up"))),
        ("sent up a round", lambda run: _mean(run.record, "bytes_up", in_bytes)),
        ("sent down", lambda run: in_bytes(run.record.total("bytes_down"))),
        ("sent down a round", lambda run: _mean(run.record, "bytes_down", in_bytes)),
        ("both ways, a client and visit", lambda run: _per_client(run.record)),
        ("down, a client and visit", lambda run: _selected(run, lambda selected: in_bytes(selected.bytes_down))),
        ("the same with the whole tables", lambda run: _selected(run, lambda selected: in_bytes(selected.with_tables))),
        ("which is as much", lambda run: _selected(run, lambda selected: in_times(selected.times_as_much))),
        ("clients a round", lambda run: _mean(run.record, "clients", in_count)),
        ("dropped in all", lambda run: in_count(run.record.total("dropped"))),
        *([("of these refused", _refused)] if any(_refused(run) != "0" for run in runs) else []),
        *_device_time(runs),
        *_staleness(runs),
    ]
    heads = ["", *_columns(runs)]
    rows = [tag("tr", tag("th", name, scope="row"), [tag("td", of(run)) for run in runs]) for name, of in measures]
    return section("What it cost", table(heads, rows))


def _refused(run: Told) -> str:
    """How many updates did not count because of what they were, and why."""
    reasons: Counter[str] = Counter()
    for event in run.record.rounds:
        reasons.update(event.get("refused") or {})
    named = ", ".join(f"{reason} {in_count(count)}" for reason, count in reasons.most_common())
    return f"{in_count(reasons.total())}{f' ({named})' if named else ''}"


def _device_time(runs: Sequence[Told]) -> list[tuple[str, Callable[[Told], str]]]:
    """What the rounds took of their devices, where one of the runs knows it."""
    if not any(run.record.total("device_seconds") for run in runs):
        return []
    return [
        ("devices worked", lambda run: in_seconds(run.record.total("device_seconds"))),
        ("of that, for nothing", lambda run: in_seconds(run.record.total("wasted_seconds"))),
        ("finished when it was over", lambda run: in_count(run.record.total("late"))),
    ]


def _staleness(runs: Sequence[Told]) -> list[tuple[str, Callable[[Told], str]]]:
    """How many versions behind updates were, where rounds of one of the runs did not wait."""
    if all(run.record.staleness is None for run in runs):
        return []

    def told(run: Told) -> str:
        held = run.record.staleness
        return "–" if held is None else f"{held['mean']:.3g}; at most {in_count(held['max'])}"

    return [("versions behind, an update", told)]


def _data(runs: Sequence[Told]) -> Markup | None:
    """The data card; one column where all runs have the same."""
    cards = _distinct([(run.label, run.record.card) for run in runs])
    if not cards:
        return None
    counts = dict.fromkeys(name for _, card in cards for name, value in card.items() if isinstance(value, int))
    has_times = any("first_time" in card for _, card in cards)
    has_density = any("density" in card for _, card in cards)
    heads = ["", *(str(card.get("name", "")) if len(cards) == 1 else label for label, card in cards)]
    measures: list[tuple[str, Callable[[Mapping[str, Any]], object]]] = [
        *([("data set", lambda card: card.get("name", "–"))] if len(cards) > 1 else []),
        *((name, partial(_counted, name)) for name in counts),
        *([("density", lambda card: in_percent(card["density"]) if "density" in card else "–")] if has_density else []),
        *([("from", lambda card: (card.get("first_time") or "–")[:10])] if has_times else []),
        *([("to", lambda card: (card.get("last_time") or "–")[:10])] if has_times else []),
    ]
    extra = dict.fromkeys(name for _, card in cards for name in card.get("extra", {}))
    rows = [
        tag("tr", tag("th", name, scope="row"), [tag("td", of(card)) for _, card in cards]) for name, of in measures
    ]
    remarks = [
        tag(
            "p",
            tag("strong", name),
            ": ",
            " / ".join(dict.fromkeys(str(card.get("extra", {}).get(name, "–")) for _, card in cards)),
        )
        for name in extra
    ]
    return section("Data", table(heads, rows), *remarks)


def _retrieval(runs: Sequence[Told]) -> Markup | None:
    """What each run's index finds, and what it costs."""
    indexes = [run.record.index for run in runs]
    if not any(indexes):
        return None
    measures: list[tuple[str, Callable[[Event], str]]] = [
        ("index", lambda index: str(index["name"])),
        ("items", lambda index: in_count(index["items"])),
        ("recall against all scored", lambda index: f"{index['recall']:.4f} @{index['at']}"),
        ("queries", lambda index: in_count(index["queries"])),
        ("microseconds a query", lambda index: f"{index['microseconds_a_query']:.3g}"),
        ("built in", lambda index: in_seconds(index["build_seconds"])),
        ("size", lambda index: in_bytes(index["bytes"])),
    ]
    rows = [
        tag("tr", tag("th", name, scope="row"), [tag("td", "–" if index is None else of(index)) for index in indexes])
        for name, of in measures
    ]
    return section("Retrieval", table(["", *_columns(runs)], rows))


def _warnings(runs: Sequence[Told]) -> Markup | None:
    notes = [
        tag("p", f"{run.label}: " if len(runs) > 1 else None, event.get("message", ""), class_="note")
        for run in runs
        for event in run.record.warnings
    ]
    return section("Warnings", *notes) if notes else None


def _surroundings(runs: Sequence[Told]) -> Markup | None:
    """Versions, and the plugins with theirs; one column where all runs have the same."""
    seen = _distinct([(run.label, run.environment) for run in runs])
    if not seen:
        return None
    one = len(seen) == 1
    names = [name for name in dict.fromkeys(name for _, each in seen for name in each) if name != "plugins"]
    heads = ["", *("version" if one else label for label, _ in seen)]
    rows = [
        tag("tr", tag("th", name, scope="row"), [tag("td", each.get(name, "–")) for _, each in seen]) for name in names
    ]
    plugins = [_plugins(None if one else label, each.get("plugins", [])) for label, each in seen if each.get("plugins")]
    return section("Versions and plugins", table(heads, rows), *plugins)


def _plugins(label: str | None, plugins: Sequence[Mapping[str, Any]]) -> Markup:
    columns = ("name", "distribution", "version", "status")
    rows = [
        tag(
            "tr",
            tag("th", plugin.get("name", "–"), scope="row"),
            [tag("td", plugin.get(column) or "–") for column in columns[1:]],
        )
        for plugin in plugins
    ]
    lost = sum(plugin.get("status") != "active" for plugin in plugins)
    said = (
        f"{len(plugins)} plugins" + (f", {lost} of them not active" if lost else "") + (f" ({label})" if label else "")
    )
    return tag("details", tag("summary", said), table(columns, rows, words=True))


def _recipes(runs: Sequence[Told]) -> Markup:
    shown = [
        tag("details", tag("summary", run.label if len(runs) > 1 else "The resolved recipe"), tag("pre", run.recipe))
        if run.recipe is not None
        else tag("p", f"{run.record.folder / RECIPE} is not there.", class_="muted")
        for run in runs
    ]
    return section("Recipes" if len(runs) > 1 else "Recipe", *shown)


def _foot(runs: Sequence[Told]) -> list[Markup]:
    version = next((run.environment["fedtower"] for run in runs if "fedtower" in run.environment), "")
    again = tag("code", f"fedtower run {runs[0].record.folder / RECIPE}")
    return [
        tag(
            "span",
            f"fedtower {version}".rstrip(),
            ". Train this again: " if len(runs) == 1 else ". Train the first again: ",
        ),
        again,
    ]


# Pieces


def section(title: str, *parts: object) -> Markup:
    """A part of a page, under a heading."""
    return tag("section", tag("h2", title), list(parts))


def table(heads: Sequence[str], rows: Sequence[Markup], *, caption: str | None = None, words: bool = False) -> Markup:
    """A table that is scrolled sideways where it is too wide; of ``words``, not of figures."""
    head = tag("thead", tag("tr", [tag("th", name, scope="col") if name else tag("td") for name in heads]))
    named = tag("caption", caption) if caption else None
    whole = tag("table", named, head, tag("tbody", list(rows)), class_="words" if words else None)
    return tag("div", whole, class_="scroll", tabindex="0")


def _columns(runs: Sequence[Told]) -> list[str]:
    return ["this run"] if len(runs) == 1 else [run.label for run in runs]


def _labels(runs: Sequence[Told]) -> list[str]:
    """The protocols by which a run was judged on its test items, in the order in which that happened."""
    return list(dict.fromkeys(str(event.get("label")) for run in runs for event in run.record.final()))


def _judged(runs: Sequence[Told], label: str) -> str:
    counts = dict.fromkeys(
        (event.get("cases"), event.get("users"))
        for run in runs
        for event in run.record.final()
        if event.get("label") == label
    )
    said = " / ".join(
        f"{in_count(cases)} cases" + (f" of {in_count(users)} users" if users else "")
        for cases, users in counts
        if cases
    )
    return f"; {said}" if said else ""


def _distinct(told: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each different mapping once, with the names of the runs that have it; empty ones left out."""
    groups: list[tuple[list[str], Mapping[str, Any]]] = []
    for label, values in told:
        same = next((labels for labels, known in groups if known == values), None)
        if same is not None:
            same.append(label)
        elif values:
            groups.append(([label], values))
    return [(", ".join(labels), values) for labels, values in groups]


def _exact(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _difference(first: float | None, second: float | None) -> str:
    """How the second run differs from the first, and by how much of the first."""
    if first is None or second is None:
        return "–"
    share = f" ({100 * (second - first) / first:+.1f} %)" if first else ""
    return f"{second - first:+.4f}{share}".replace("-", "−")


def _mean(record: RunRecord, name: str, unit: Callable[[float], str]) -> str:
    return unit(record.total(name) / len(record.rounds)) if record.rounds else "–"


def _per_client(record: RunRecord) -> str:
    visits = record.total("clients")
    return in_bytes((record.total("bytes_up") + record.total("bytes_down")) / visits) if visits else "–"


def _selected(run: Told, of: Callable[[RowSelection], str]) -> str:
    selected = run.record.row_selection
    return "–" if selected is None else of(selected)


def _is_share(name: str) -> bool:
    """Whether a metric is one that popularity alone has little of, so that being twice as good says something."""
    return "@" in name


def _counted(name: str, card: Mapping[str, Any]) -> str:
    return in_count(card[name]) if name in card else "–"


def _when(time: str | None) -> str:
    return "unknown date" if time is None else time[:16].replace("T", " ") + (" UTC" if time.endswith("+00:00") else "")
