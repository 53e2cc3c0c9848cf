"""Grid: the entries and tables of a suite in which everything is run with everything.

In a suite's file::

    [[grids]]
    recipe = "dssm-ml-100k"
    columns = ["HR@10", "ER@10"]
    options = ["rounds=60"]

    [[grids.cases]]               # a table each; the first one is what the others are compared with
    name = "none"
    title = "No attack"
    options = ["attack.name=sign_flip", "attack.share=0"]

    [[grids.rows]]                # a line of every table
    name = "median"
    title = "Median"
    options = ["aggregator.name=median"]

makes the entry ``none-median``, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedtower.core.errors import RecipeError
from fedtower.core.settings import build


@dataclass(frozen=True)
class Side:
    """A case or a row: what it adds to the recipe."""

    name: str
    title: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Every case with every row."""

    recipe: str
    columns: tuple[Any, ...]
    cases: tuple[Side, ...]
    rows: tuple[Side, ...]
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.cases or not self.rows:
            raise RecipeError("a grid needs cases and rows, at least one of each")

    def entries(self) -> list[dict[str, Any]]:
        """An entry for each case and row, case by case."""
        return [self._entry(case, row) for case in self.cases for row in self.rows]

    def tables(self) -> list[dict[str, Any]]:
        """A table for each case."""
        return [
            {
                "title": case.title,
                "columns": list(self.columns),
                "entries": [f"{case.name}-{row.name}" for row in self.rows],
            }
            for case in self.cases
        ]

    def _entry(self, case: Side, row: Side) -> dict[str, Any]:
        against = {"against": f"{self.cases[0].name}-{row.name}"} if case is not self.cases[0] else {}
        return {
            "name": f"{case.name}-{row.name}",
            "title": row.title,
            "recipe": self.recipe,
            "options": [*self.options, *case.options, *row.options],
            "quick": list(self.quick),
            **against,
        }


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A suite's values with the entries and tables of its ``grids`` after its own.

    Raises:
        RecipeError: a grid says something that grids do not have.
    """
    plain = {key: value for key, value in values.items() if key != "grids"}
    for number, given in enumerate(values.get("grids", [])):
        grid = build(Grid, given, path=f"grids.{number}")
        plain["entries"] = [*plain.get("entries", []), *grid.entries()]
        plain["tables"] = [*plain.get("tables", []), *grid.tables()]
    return plain
