"""A run's own ``fedtower_plugins.py``: it keeps what every round was made of, before the journal lets go of it.

In ``kept/`` of the run's folder: a file for each accepted upload, ``ROUND-TASK-POSITION-CLIENT``, and in ``totals`` a
line for each folding, ``ROUND DIGEST``; a round that a kill made the process fold again has several.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from fedtower.core.hooks import hookimpl
from fedtower.core.journal import Journal
from fedtower.core.recipe import Recipe
from fedtower.core.registry import discover
from fedtower.core.updates import Updates
from fedtower.recsys.run_folder import RunFolder

_running: dict[str, Any] = {}


@hookimpl
def run_started(recipe: Recipe, folder: Path) -> None:
    """Remember whose run it is."""
    (folder / "kept").mkdir(exist_ok=True)
    _running.update(recipe=recipe, folder=folder)


@hookimpl(wrapper=True)
def aggregate(round: int) -> Generator[None, Any, Any]:
    """Write down what a round adds up to, to the bit."""
    result = yield
    with (_running["folder"] / "kept" / "totals").open("a") as file:
        file.write(f"{round} {digest_of(result[0])}\n")
    return result


@hookimpl
def checkpoint_written(round: int) -> None:
    """Keep the uploads of the rounds that are about to be let go of."""
    journal = journal_of(_running["folder"], _running["recipe"])
    try:
        keep(journal, _running["folder"] / "kept")
    finally:
        journal.close()


def journal_of(folder: Path, recipe: Recipe) -> Journal:
    """The journal of a run, opened once more."""
    factory = discover().make("journal", recipe.journal, path="journal")
    journal: Journal = factory.open(folder / "journal", RunFolder.open(folder).federation().name)
    return journal


def keep(journal: Journal, kept: Path) -> None:
    """Copy what the journal has."""
    for record in journal.rounds():
        for each in () if record.retired else journal.accepted(record.round, record.task):
            path = kept / f"{each.round:06d}-{each.task}-{each.position:06d}-{each.client}"
            path.write_bytes(each.payload)


def digest_of(total: Updates) -> str:
    """A digest of every bit of a total."""
    digest = hashlib.sha256(np.ascontiguousarray(total.weights).tobytes())
    for name, value in sorted(total.dense.items()):
        digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    for name, rows in sorted(total.rows.items()):
        weights = np.zeros(0) if rows.row_weights is None else rows.row_weights
        for part in (rows.offsets, rows.row_ids, rows.row_deltas, weights):
            digest.update(name.encode() + np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
