"""Small real values of core's nouns, for promises and for a plugin's own tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.recipe import Recipe, parse_recipe
from fedtower.core.round import RoundReport
from fedtower.core.updates import Rows, Updates, stack

DENSE_SHAPES: dict[str, tuple[int, ...]] = {"tower.weight": (3, 2), "tower.bias": (3,), "scale": ()}
TABLE_ROWS, TABLE_DIM = 11, 4

DATA_CARD: dict[str, Any] = {
    "name": "example",
    "users": 100,
    "items": 200,
    "interactions": 5_000,
    "density": 0.25,
    "first_time": "2020-01-01T00:00:00+00:00",
    "last_time": "2021-01-01T00:00:00+00:00",
    "extra": {"source": "made up"},
}
"""What observers are given in ``data_loaded``."""


INDEX: dict[str, Any] = {
    "name": "exact",
    "items": 200,
    "recall": 1.0,
    "at": 10,
    "queries": 100,
    "build_seconds": 0.01,
    "microseconds_a_query": 25.0,
    "bytes": 8_000,
}
"""What observers are given in ``index_built``."""


def plan(round: int = 1, seed: int = 1) -> Plan:
    """What a cohort of round ``round`` is sent: three small parameters."""
    draws = Draws(seed)
    parameters = {name: _normal(draws, f"parameter/{name}", shape) for name, shape in DENSE_SHAPES.items()}
    return Plan(round, parameters, LocalSettings(steps=1))


def updates(clients: int = 7, *, rows: bool = True, round: int = 1, seed: int = 1) -> Updates:
    """A block of ``clients`` clients, each with its own deltas and weight, touching one to five rows of ``item``."""
    draws = Draws(seed)
    ids = 3 * np.arange(clients, dtype=np.int64) + 2
    dense = {name: _normal(draws, f"delta/{name}", (clients, *shape)) for name, shape in DENSE_SHAPES.items()}
    return Updates(
        weights=1.0 + draws.integers(5, "weight", ids).astype(np.float64),
        dense=dense,
        rows={"item": _rows(draws, clients)} if rows else {},
        clients=ids,
        rounds=np.full(clients, round, dtype=np.int64),
        metrics={
            "loss": draws.uniform("loss", ids),
            "steps": 1.0 + draws.integers(4, "steps", ids).astype(np.float64),
        },
    )


def cancelling(*, rows: bool = True, seed: int = 1) -> Updates:
    """Seven clients whose large deltas cancel: a sum of floats keeps what the order of its terms leaves of the rest."""
    large, small = updates(3, rows=rows, seed=seed), updates(1, rows=rows, seed=seed)
    whole = stack([_times(large, 3e7), _times(small, 1e-3), _times(large, -3e7)])
    return replace(whole, weights=np.full(7, 0.3), clients=np.arange(7, dtype=np.int64))


def cohort(round: int = 1) -> Cohort:
    """The clients of :func:`updates`, of a population of 100."""
    return Cohort(round, 3 * np.arange(7, dtype=np.int64) + 2, 100)


def recipe() -> Recipe:
    """A recipe of fedtower's own parts."""
    return parse_recipe(
        {
            "name": "example",
            "rounds": 3,
            "data": {"name": "synthetic", "users": 100},
            "model": {"name": "dssm", "dim": 8},
            "local": {"steps": 1},
            "cohort": {"name": "uniform", "size": 7},
            "server": {"optimizer": "adam", "lr": 0.005},
        }
    )


def report(round: int = 1) -> RoundReport:
    """What round ``round`` of three did."""
    return RoundReport(
        round=round,
        total_rounds=3,
        loss=1.0 / round,
        clients=6,
        dropped=1,
        bytes_up=4_000,
        bytes_down=9_000,
        seconds=0.25,
        metrics={"clipped": 0.5},
        refused={"norm": 1},
    )


@dataclass(frozen=True)
class Evaluation:
    """What observers are given in ``evaluated``, field by field as ``fedtower.recsys.evaluation.Evaluation``."""

    role: str = "validation"
    protocol_label: str = "sampled, 99 negatives"
    metrics: dict[str, float] = field(default_factory=lambda: {"HR@10": 0.5, "NDCG@10": 0.25})
    cases: int = 100
    users: int = 100


def _rows(draws: Draws, clients: int) -> Rows:
    """Row 0 is touched by everybody, the others by some."""
    places = np.arange(clients, dtype=np.int64)
    wide = draws.uniform("touched", places[:, None], np.arange(TABLE_ROWS)[None, :]) < 0.3
    wide[:, 0] = True
    owners, ids = np.nonzero(wide)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=clients))])
    return Rows(offsets.astype(np.int64), ids.astype(np.int64), _normal(draws, "row", (len(ids), TABLE_DIM)))


def _times(block: Updates, factor: float) -> Updates:
    rows = {t: replace(part, row_deltas=part.row_deltas * np.float32(factor)) for t, part in block.rows.items()}
    return replace(block, dense={name: delta * np.float32(factor) for name, delta in block.dense.items()}, rows=rows)


def _normal(draws: Draws, purpose: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    size = int(np.prod(shape))
    values: NDArray[Any] = draws.normal(purpose, np.arange(size, dtype=np.int64))
    return values.reshape(shape).astype(np.float32)
