"""A program for two processes: the same tables spread over both, and whole in each, do the same."""

from __future__ import annotations

import sys

import click
import numpy as np
import torch

from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError
from fedtower.core.plan import RowSettings
from fedtower.plugins.models.dssm.model import ItemTower
from fedtower.recsys.models import Declared, SharedTower, Table
from fedtower.recsys.processes import ALONE, Processes, together
from fedtower.recsys.tables import CloudTables, RowOutOfRange

ROWS, DIM, FEATURES = 23, 8, 3
DRAWS = Draws(6)
IDS = [[], [22], [0, 22], [3, 3, 1, 20, 11], list(range(ROWS)), list(range(ROWS)) * 3]


def make(settings: RowSettings, processes: Processes) -> CloudTables:
    """dssm's cloud part."""
    generator = torch.Generator().manual_seed(3)
    tower = ItemTower(DIM, FEATURES, 6, generator)
    tables = (Table("item", ROWS, DIM, 0.5), Table("item_bias", ROWS, 4, 0.1))
    declared = Declared(SharedTower(), tables, tower)
    return CloudTables(declared, features, settings, generator, processes=processes)


def features(ids: np.ndarray) -> np.ndarray:
    return DRAWS.normal("features", ids[:, None], np.arange(FEATURES)[None]).astype(np.float32)


def check(what: str, holds: bool) -> None:
    """Say what does not hold."""
    if not holds:
        click.echo(f"not so: {what}")


def lead(spread: CloudTables, whole: CloudTables) -> None:
    """What the leading process alone does: fetch and apply."""
    for ids in (np.array(each, dtype=np.int64) for each in IDS):
        check(f"fetched {len(ids)}", np.allclose(spread.fetch("item", ids), whole.fetch("item", ids), atol=1e-7))
    for wrong in (-1, ROWS, 2**40):
        ids = np.array([1, wrong])
        for act in (
            lambda ids=ids: spread.fetch("item", ids),
            lambda ids=ids: spread.apply({"item": (ids, np.ones((2, DIM + 1), np.float32))}, 1.0),
        ):
            try:
                act()
                check(f"{wrong} is refused", False)
            except RowOutOfRange:
                check("a refusal disturbs nobody", spread.generation == whole.generation)
    for tables in (spread, whole):
        step_along(tables)
    everything = np.arange(ROWS)
    check("applied", np.allclose(spread.fetch("item", everything), whole.fetch("item", everything), atol=1e-6))
    check("generation", spread.generation == whole.generation == 6)


def step_along(tables: CloudTables) -> None:
    """Apply deltas of 7, 4 and 1 rows, and nothing between them."""
    for step in range(3):
        ids = np.sort(DRAWS.permutation(ROWS, "ids", step)[: 7 - 3 * step])
        delta = DRAWS.normal("delta", step, ids[:, None], np.arange(DIM + 1)[None]).astype(np.float32)
        tables.apply({"item": (ids, delta)}, 1.0 - 0.2 * step)
        tables.apply({}, 1.0)


def together_in_step(spread: CloudTables, whole: CloudTables, rank: int) -> None:
    """What both do at once, each with rows of its own; some of them are both's, and one asks for none."""
    asked: list[list[list[int]]] = [[[0, 5, 22], [5, 7]], [[1], []], [[], [2, 3]], [[], []]]
    for mine in asked:
        for tables, ids in ((spread, mine[rank]), (whole, mine[0] + mine[1])):
            tables.begin(0.5)
            rows = tables.rows("item", np.array(ids, dtype=np.int64))
            rows.sum().backward()  # type: ignore[no-untyped-call]
            tables.finish()
    arrays = [tables.snapshot() for tables in (spread, whole)]
    for name in arrays[0]:
        check(name, np.allclose(arrays[0][name], arrays[1][name], atol=1e-6))


def main() -> None:
    with together() as processes:
        for settings in (RowSettings(lr=0.1), RowSettings(lr=0.1, optimizer="sgd", sharding="table_wise")):
            spread, whole = make(settings, processes), make(settings, ALONE)
            if processes.leads:
                lead(spread, whole)
                processes.order("end")
            else:
                processes.serve(spread.help)
                step_along(whole)
            together_in_step(spread, whole, processes.rank)
        click.echo("all of it")
        spread.rows("item", np.array([1 if processes.leads else 99]))


if __name__ == "__main__":
    try:
        main()
    except FedtowerError as error:
        click.echo("" if error.is_told else error)
        sys.exit(error.exit_code)
