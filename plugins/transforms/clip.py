"""Norm clipping: no client's update is longer than a bound.

McMahan et al., 2018, https://arxiv.org/abs/1710.06963, flat clipping: one norm over everything that the client sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates

States = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Clip:
    r"""Each client's update times :math:`\min(1, \text{norm} / \lVert\Delta\rVert_2)`, dense parameters and rows
    together.

    An update that is not finite has no norm; it passes as it is, for the server to refuse.
    """

    norm: float = field(metadata={"help": "the longest that an update may be (L2)"})

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise RecipeError(f"the norm of the transform 'clip' must be positive, not {self.norm}")

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        squared = np.zeros(len(updates))
        for delta in updates.dense.values():
            squared += np.square(delta.astype(np.float64)).reshape(len(updates), -1).sum(axis=1)
        for part in updates.rows.values():
            lengths = np.square(part.row_deltas.astype(np.float64)).sum(axis=1)
            squared += np.bincount(part.owners, weights=lengths, minlength=len(updates))
        with np.errstate(divide="ignore"):
            factor = np.minimum(1.0, self.norm / np.sqrt(squared)).astype(np.float32)
        factor[~np.isfinite(squared)] = 1.0
        dense = {name: delta * factor.reshape(-1, *([1] * (delta.ndim - 1))) for name, delta in updates.dense.items()}
        rows = {
            table: replace(part, row_deltas=part.row_deltas * factor[part.owners][:, None])
            for table, part in updates.rows.items()
        }
        clipped = (factor < 1).astype(np.float64)
        return replace(updates, dense=dense, rows=rows, metrics={**updates.metrics, "clipped": clipped}), state

    def decode(self, block: Updates) -> Updates:
        return block

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return total


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transform(
        "clip",
        "fedtower.plugins.transforms.clip:Clip",
        summary="no client's update is longer than a bound",
        capabilities={"example": {"norm": 1.0}, "bounded_norm": True},
    )
