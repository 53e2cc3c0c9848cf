"""Grids: everything with everything, and what a suite becomes of them."""

from __future__ import annotations

import tomllib

import pytest

from fedtower.core.errors import RecipeError
from fedtower.core.settings import build
from fedtower.recsys.suite import Suite
from fedtower.recsys.suite_grid import expanded

GRID = """
title = "Attacks"

[[entries]]
name = "central"
recipe = "dssm-synthetic"

[[tables]]
title = "Central"
columns = ["HR@10"]
entries = ["central"]

[[grids]]
recipe = "dssm-synthetic"
columns = ["HR@10", {of = "HR@10", reach = 0.5}]
options = ["rounds=3"]
quick = ["rounds=2"]
cases = [{name = "none", title = "Nobody"}, {name = "flip", title = "Flip", options = ["attack.name=flip"]}]
rows = [{name = "mean", title = "Mean"}, {name = "median", title = "Median", options = ["aggregator.name=median"]}]
"""


def test_every_case_has_every_row_a_table_and_is_compared_with_the_first() -> None:
    suite = build(Suite, expanded(tomllib.loads(GRID)), path="")
    assert [entry.name for entry in suite.entries] == [
        "central",
        "none-mean",
        "none-median",
        "flip-mean",
        "flip-median",
    ]
    last = suite.entry("flip-median")
    assert last.options == ("rounds=3", "attack.name=flip", "aggregator.name=median")
    assert (last.words, last.recipe, last.quick) == ("Median", "dssm-synthetic", ("rounds=2",))
    assert [entry.against for entry in suite.entries] == ["", "", "", "none-mean", "none-median"]
    assert [(table.title, table.entries) for table in suite.tables] == [
        ("Central", ("central",)),
        ("Nobody", ("none-mean", "none-median")),
        ("Flip", ("flip-mean", "flip-median")),
    ]
    assert [column.key for column in suite.tables[2].all_columns] == ["HR@10", "rounds to HR@10 0.5"]


def test_a_suite_without_grids_stays_as_it_is() -> None:
    values = tomllib.loads(GRID.partition("[[grids]]")[0])
    assert expanded(values) == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GRID.replace("cases = [", "cases = [] #"), "a grid needs cases and rows, at least one of each"),
        (GRID.replace("quick = [", "quik = ["), r"grids\.0\.quik is not a setting of Grid \(did you mean 'quick'"),
    ],
)
def test_a_grid_that_says_something_else_is_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        expanded(tomllib.loads(text))
