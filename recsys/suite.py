"""Suite: a benchmark as data: which recipes are run, with which seeds, and how their figures are laid out.

A suite is a TOML file that a plugin offers with ``registry.suite("mine", "my_package:suite.toml")``::

    title = "MovieLens"
    seeds = [1, 2, 3]

    [quick]                       # what `--quick` runs instead
    seeds = [1]

    [[entries]]
    name = "dssm-100k"
    title = "DSSM, federated"
    recipe = "dssm-ml-100k"       # a recipe's name
    options = ["rounds=300"]      # as after -o
    quick = ["rounds=60"]         # more of them, for `--quick`
    against = "dssm-100k-central" # differences are taken from this entry, seed by seed

    [entries.published]           # what others have printed, by column
    "HR@10" = 0.716

    [[tables]]
    title = "ML-100K"
    columns = ["HR@10", {of = "accuracy", reach = 0.97}, {of = "accuracy", reach = 0.97, unit = "passes"}]
    entries = ["dssm-100k"]       # all of them, if this is left out

    [[plots]]
    title = "Accuracy over rounds"
    y = "accuracy"                # over rounds; or over a column, with x = "bytes_up"

Where everything is run with everything, :mod:`fedtower.recsys.suite_grid` writes the entries and the tables.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedtower.core.errors import RecipeError, nearest
from fedtower.core.offers import read_target
from fedtower.core.recipe import Recipe, load_recipe
from fedtower.core.registry import Registry
from fedtower.core.settings import build
from fedtower.recsys.suite_grid import expanded

TOTALS: Mapping[str, str] = {
    "rounds": "rounds",
    "seconds": "time",
    "bytes_up": "up",
    "bytes_down": "down",
    "bytes_up_a_visit": "up a visit",
    "bytes_down_a_visit": "down a visit",
}
"""The columns that are no metric of the test data, and what a table calls them."""


@dataclass(frozen=True)
class Column:
    """One figure of every run: a metric of its test data, one of :data:`TOTALS`, or with ``reach`` the first round
    after which the validation metric ``of`` is at least that (or, of a loss, at most); in ``passes``, how often as many
    examples as the training data has were trained on by then.
    """

    of: str
    reach: float | None = None
    title: str = ""
    unit: Literal["rounds", "passes"] = "rounds"

    @property
    def key(self) -> str:
        """The column's name in results."""
        return self.of if self.reach is None else f"{self.unit} to {self.of} {self.reach:g}"

    @property
    def head(self) -> str:
        """What stands over the column."""
        return self.title or TOTALS.get(self.key, self.key)

    @property
    def less_is_better(self) -> bool:
        """Whether a smaller figure is the better one."""
        return self.reach is not None or self.of in TOTALS or self.of.endswith("loss")


@dataclass(frozen=True)
class Entry:
    """One row: a recipe with options, run once a seed. ``group`` joins entries to one line of a plot."""

    name: str
    recipe: str
    title: str = ""
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    against: str = ""
    group: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    @property
    def words(self) -> str:
        """What a table calls it."""
        return self.title or self.name


@dataclass(frozen=True)
class Layout:
    """One table."""

    title: str
    columns: tuple[Column | str, ...]
    entries: tuple[str, ...] = ()
    note: str = ""

    @property
    def all_columns(self) -> tuple[Column, ...]:
        """The columns."""
        return tuple(Column(each) if isinstance(each, str) else each for each in self.columns)


@dataclass(frozen=True)
class Plot:
    """One drawing: the validation metric ``y`` over rounds, a line an entry; or the column ``y`` over the column ``x``,
    a point an entry and a line a group.
    """

    title: str
    y: str
    x: str = "rounds"
    entries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quick:
    """What makes a suite one of minutes."""

    seeds: tuple[int, ...] = (20260,)
    options: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A benchmark: see the head of this module."""

    title: str
    entries: tuple[Entry, ...]
    tables: tuple[Layout, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    about: str = ""
    options: tuple[str, ...] = ()
    quick: Quick = field(default_factory=Quick)
    plots: tuple[Plot, ...] = ()

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None or not names:
            raise RecipeError(f"a suite needs entries, each with a name of its own, but {twice!r} is there twice")
        if not self.seeds or not self.quick.seeds:
            raise RecipeError("a suite needs at least one seed, in seeds and in quick.seeds")
        columns = [column for layout in self.tables for column in layout.all_columns]
        if any(column.unit != "rounds" and column.reach is None for column in columns):
            raise RecipeError("a column's unit is of what is reached: give every column that has one a reach as well")
        asked = [("against", entry.against) for entry in self.entries if entry.against]
        asked += [(f"the table {each.title!r}", name) for each in self.tables for name in each.entries]
        asked += [(f"the plot {each.title!r}", name) for each in self.plots for name in each.entries]
        asked += [("quick", name) for name in self.quick.entries]
        for where, name in asked:
            if name not in names:
                raise RecipeError(f"{where} names the entry {name!r}{nearest(name, names)}; there are {names}")

    def entry(self, name: str) -> Entry:
        """The entry of that name."""
        return next(entry for entry in self.entries if entry.name == name)

    def rows(self, chosen: Sequence[str]) -> list[Entry]:
        """The entries of those names, or all, in the suite's order."""
        return [entry for entry in self.entries if not chosen or entry.name in chosen]


@dataclass(frozen=True)
class Task:
    """One run of a suite: an entry with a seed, and the recipe that comes of it."""

    entry: Entry
    seed: int
    options: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """The run's name."""
        return self.recipe.name


def load_suite(name: str, registry: Registry) -> Suite:
    """The suite that is offered under this name.

    Raises:
        RecipeError: it says something that suites do not have.
        PluginError: its file cannot be read.
    """
    offer = registry.get("suite", name)
    try:
        return build(Suite, expanded(tomllib.loads(read_target(offer))), path="")
    except (tomllib.TOMLDecodeError, RecipeError) as error:
        raise RecipeError(f"the suite {offer.name} of {offer.origin} cannot be run: {error}") from error


def tasks_of(
    suite: Suite,
    registry: Registry,
    *,
    quick: bool = False,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    options: Sequence[str] = (),
) -> list[Task]:
    """The runs of a suite, each recipe checked before the first one begins.

    Raises:
        RecipeError: an entry's recipe or options are wrong, or ``only`` names an entry that is not there.
    """
    names = [entry.name for entry in suite.entries]
    unknown = next((name for name in only if name not in names), None)
    if unknown is not None:
        raise RecipeError(f"the suite has no entry {unknown!r}{nearest(unknown, names)}; it has {', '.join(names)}")
    chosen = suite.rows(only or (suite.quick.entries if quick else ()))
    all_seeds = seeds or (suite.quick.seeds if quick else suite.seeds)
    return [
        task_of(suite, entry, seed, registry, quick=quick, options=options) for seed in all_seeds for entry in chosen
    ]


def task_of(
    suite: Suite, entry: Entry, seed: int, registry: Registry, *, quick: bool = False, options: Sequence[str] = ()
) -> Task:
    """One run of an entry.

    Raises:
        RecipeError: its recipe or the options are wrong.
    """
    said = [*suite.options, *entry.options, *((*suite.quick.options, *entry.quick) if quick else ()), *options]
    all_options = (*said, f"seed={seed}", f"name={entry.name}-s{seed}")
    try:
        recipe = load_recipe(entry.recipe, all_options, registry)
    except RecipeError as error:
        raise RecipeError(f"the entry {entry.name!r}: {error}") from error
    return Task(entry, seed, all_options, recipe)
