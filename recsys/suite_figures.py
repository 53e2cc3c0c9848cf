"""The figures of a suite: of every run, and over the seeds of an entry, with how sure a difference is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fedtower.recsys.runlog import RunRecord
from fedtower.recsys.suite import Column, Entry, Layout, Plot, Suite

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Finished:
    """One run of a suite: what it reached, or why it has nothing. A figure that it never came to is not there, and
    neither is one that its log cannot tell, which is among ``untold``.
    """

    entry: str
    seed: int
    folder: str = ""
    error: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    protocol: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    untold: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, its standard deviation (of a sample; 0 for one), and how many there are."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of values; of none, none.

        >>> Spread.of([0.70, 0.72])
        Spread(mean=0.71, deviation=0.014142135623730963, count=2)
        """
        if not values:
            return None
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return cls(float(np.mean(values)), deviation, len(values))


@dataclass(frozen=True)
class Difference:
    """An entry's figure less another's, seed by seed: the mean, and the two-sided p-value of a paired t-test; ``None``
    where there are not two seeds, or all differences are the same.
    """

    against: str
    mean: float
    p: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    entry: Entry
    figures: Mapping[str, Spread | None]
    differences: Mapping[str, Difference]
    fewer: float | None  # times fewer bytes up than the entry it is held against
    failed: int
    runs: int
    never: Mapping[str, int]  # runs that came to their end and not to the figure

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "entry": self.entry.name,
            "title": self.entry.words,
            "runs": self.runs,
            "failed": self.failed,
            "never": dict(self.never),
            "figures": {key: None if each is None else asdict(each) for key, each in self.figures.items()},
            "differences": {key: asdict(each) for key, each in self.differences.items()},
            "times_fewer_bytes_up": self.fewer,
            "published": dict(self.entry.published),
            "source": self.entry.source,
        }


@dataclass(frozen=True)
class Results:
    """A suite as far as it has been run."""

    name: str
    suite: Suite
    quick: bool
    runs: Sequence[Finished]
    planned: int

    def of(self, entry: str) -> list[Finished]:
        """The runs of an entry that came to their end."""
        return [run for run in self.runs if run.entry == entry and not run.error]

    def values(self, entry: str, key: str) -> dict[int, float]:
        """A figure of an entry by seed."""
        return {run.seed: run.figures[key] for run in self.of(entry) if key in run.figures}

    def table(self, layout: Layout) -> list[Row]:
        """The rows of a table; entries of which no run was wanted are left out."""
        there = {run.entry for run in self.runs}
        return [self._row(entry, layout) for entry in self.suite.rows(layout.entries) if entry.name in there]

    @property
    def layouts(self) -> list[Layout]:
        """The tables that have a row; before anything has run, all."""
        return [layout for layout in self.suite.tables if not self.runs or self.table(layout)]

    def curves(self, plot: Plot) -> list[tuple[str, Curve]]:
        """The lines of a plot: over rounds the mean over seeds, an entry a line; over another column a group a line."""
        entries = [entry for entry in self.suite.rows(plot.entries) if self.of(entry.name)]
        if plot.x == "rounds":
            curves = [
                (entry.words, mean_curve([run.curves.get(plot.y, ()) for run in self.of(entry.name)]))
                for entry in entries
            ]
            return [(title, curve) for title, curve in curves if curve]
        grouped: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            x, y = (Spread.of([*self.values(entry.name, key).values()]) for key in (plot.x, plot.y))
            if x is not None and y is not None:
                grouped.setdefault(entry.group or entry.words, []).append((x.mean, y.mean))
        return [(title, sorted(points)) for title, points in grouped.items()]

    def to_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds."""
        return {
            "suite": self.name,
            "title": self.suite.title,
            "quick": self.quick,
            "runs": [run.to_dict() for run in self.runs],
            "planned": self.planned,
            "tables": [
                {
                    "title": layout.title,
                    "columns": [column.key for column in layout.all_columns],
                    "rows": [row.to_dict() for row in self.table(layout)],
                }
                for layout in self.layouts
            ],
        }

    def _row(self, entry: Entry, layout: Layout) -> Row:
        keys = [column.key for column in layout.all_columns]
        runs = [run for run in self.runs if run.entry == entry.name]
        figures = {key: Spread.of([*self.values(entry.name, key).values()]) for key in keys}
        differences = {}
        for key in keys if entry.against else ():
            found = difference(entry.against, self.values(entry.name, key), self.values(entry.against, key))
            if found is not None:
                differences[key] = found
        ours, theirs = (self.values(name, "bytes_up") for name in (entry.name, entry.against))
        failed = sum(bool(run.error) for run in runs)
        never = {column.key: self._never(entry.name, column.key) for column in layout.all_columns if column.reach}
        return Row(entry, figures, differences, fewer(ours, theirs), failed, len(runs), never)

    def _never(self, entry: str, key: str) -> int:
        return sum(key not in run.figures and key not in run.untold for run in self.of(entry))


def difference(against: str, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """The difference over the seeds that both have.

    >>> difference("b", {1: 0.71, 2: 0.72}, {1: 0.70, 3: 0.5})
    Difference(against='b', mean=0.01, p=None, count=1)
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    first, second = ([of[seed] for seed in seeds] for of in (ours, theirs))
    apart = np.subtract(first, second)
    p = None
    if len(seeds) > 1 and not np.allclose(apart, apart[0], rtol=1e-9, atol=0.0):  # apart by more than a rounding
        from scipy.stats import ttest_rel  # takes a second to import, and a suite of one seed does not need it

        p = float(ttest_rel(first, second).pvalue)
    return Difference(against, float(np.mean(apart)), p, len(seeds))


def fewer(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """How many times ours go into theirs, over the seeds that both have; ``None`` where one of them is nothing.

    >>> fewer({1: 2.0, 2: 3.0}, {1: 100.0, 2: 150.0, 3: 9.0}), fewer({1: 2.0}, {1: 0.0})
    (50.0, None)
    """
    seeds = ours.keys() & theirs.keys()
    less, more = (sum(of[seed] for seed in seeds) for of in (ours, theirs))
    return more / less if less and more else None


def finished_run(
    entry: str, seed: int, record: RunRecord, columns: Sequence[Column], plots: Iterable[Plot]
) -> Finished:
    """What a suite wants of a run that came to its end."""
    final = record.final("test")
    tested = final[0] if final else {}
    figures = {column.key: value for column in columns if (value := _value(column, record, tested)) is not None}
    untold = tuple(column.key for column in columns if column.reach is not None and not _along(column, record))
    wanted = {plot.y for plot in plots if plot.x == "rounds"}
    curves = {name: found for name in wanted if (found := curve(record, name))}
    label = str(tested.get("label", ""))
    return Finished(entry, seed, str(record.folder), figures=figures, protocol=label, curves=curves, untold=untold)


def curve(record: RunRecord, metric: str) -> list[tuple[float, float]]:
    """A validation metric over rounds; the training loss under the name ``loss``."""
    if metric == "loss":
        return [(event["round"], event["loss"]) for event in record.rounds if event.get("loss") is not None]
    events = [event for event in record.evaluations if event.get("role") == "validation"]
    points = [(float(event["round"]), event.get("metrics", {}).get(metric)) for event in events]
    return sorted((round, float(value)) for round, value in points if value is not None)


def reached(points: Curve, target: float, *, falling: bool = False) -> float | None:
    """The round at which the best value so far comes to ``target``, between two looks by a straight line: how McMahan
    et al., 2017, https://arxiv.org/abs/1602.05629, count rounds. ``None`` if it never does.

    >>> reached([(1, 0.90), (2, 0.96), (3, 0.95), (4, 0.98)], 0.97)
    3.5
    """
    sign, before, best = (-1.0 if falling else 1.0), 0.0, -math.inf
    for round, value in points:
        now = max(best, sign * value)
        if now >= sign * target:
            share = 1.0 if not math.isfinite(best) or now == best else (sign * target - best) / (now - best)
            return before + share * (round - before)
        before, best = round, now
    return None


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean of curves at the rounds that all of them have.

    >>> mean_curve([[(1, 0.5), (2, 0.6)], [(1, 0.7)]])
    [(1, 0.6)]
    """
    held = [dict(each) for each in curves]
    rounds = sorted(set.intersection(*map(set, held))) if held else []
    return [(round, float(np.mean([each[round] for each in held]))) for round in rounds]


def _value(column: Column, record: RunRecord, tested: Mapping[str, Any]) -> float | None:
    if column.reach is not None:
        return reached(_along(column, record), column.reach, falling=column.of.endswith("loss"))
    if column.of == "rounds":
        return float(record.last_round)
    if column.of.endswith("_a_visit"):
        sent, visits = record.total(column.of.removesuffix("_a_visit")), record.total("clients")
        return sent / visits if sent and visits else None  # a central run has no visits
    if column.of in ("seconds", "bytes_up", "bytes_down"):
        return float(record.total(column.of))
    value = tested.get("metrics", {}).get(column.of)
    return None if value is None else float(value)


def _along(column: Column, record: RunRecord) -> Curve:
    """The curve in the column's unit; none where nobody looked, or where passes cannot be counted."""
    points = curve(record, column.of)
    return _by_passes(points, record) if column.unit == "passes" else points


def _by_passes(points: Curve, record: RunRecord) -> Curve:
    """A curve over passes through the training data; none where the log does not count examples, or the data's card has
    not how many there are, as that of histories.
    """
    whole, taken = record.card.get("training examples"), 0.0
    after: dict[float, float] = {}
    for event in record.rounds:
        if whole is None or event.get("examples") is None:
            return []
        taken += event["examples"]
        after[float(event["round"])] = taken / whole
    return [(after[round], value) for round, value in points]
