"""A little is enough: attackers hide within the spread of the honest updates, all on the same side.

Baruch et al., 2019, https://arxiv.org/abs/1902.06156.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Rows, Updates
from fedtower.recsys.attacks import Attack

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ALIE(Attack):
    r"""Every attacker sends :math:`\mu - z \sigma`, the mean less z deviations of each coordinate, over the updates of
    the cohort before any of them was replaced; a row's are over the clients that touched it.

    The paper's attackers know one another's updates alone; these see everybody's. Without ``z`` it is the paper's
    :math:`z^{max}`, by which so many honest clients lie further out that with the attackers they are a majority; its
    authors' own program takes 1.5.
    """

    z: float | None = field(
        default=None, metadata={"help": "how many deviations; left out, as many as a majority hides"}
    )

    def __post_init__(self) -> None:
        if self.z is not None and not self.z > 0:
            raise RecipeError(f"attack.z must be above 0, not {self.z}; leave it out for what a majority hides")

    def sent(self, updates: Updates, attackers: Mask) -> Updates:
        z = hidden_by_a_majority(len(updates), int(attackers.sum())) if self.z is None else self.z
        dense = {}
        for name, delta in updates.dense.items():
            values = delta.astype(np.float64)
            dense[name] = np.array(delta)
            dense[name][attackers] = values.mean(axis=0) - z * values.std(axis=0)
        rows = {table: _hidden(part, attackers, z) for table, part in updates.rows.items()}
        return replace(updates, dense=dense, rows=rows)


def hidden_by_a_majority(clients: int, attackers: int) -> float:
    """The paper's largest z: of ``clients`` in all, among them so many attackers; 0 where a majority is not needed.

    >>> hidden_by_a_majority(50, 12)
    0.3360
    """
    needed = clients // 2 + 1 - attackers  # honest ones that lie further out
    honest = clients - attackers
    share = (honest - needed) / honest if honest else 1.0
    return max(NormalDist().inv_cdf(share), 0.0) if 0.0 < share < 1.0 else 0.0


def _hidden(part: Rows, attackers: Mask, z: float) -> Rows:
    """The attackers' rows z deviations below the mean of those who touched the row."""
    _, row = np.unique(part.row_ids, return_inverse=True)
    touched = np.bincount(row)[:, None]
    sums, squares = (np.zeros((len(touched), part.row_deltas.shape[1])) for _ in range(2))
    np.add.at(sums, row, part.row_deltas)
    mean = sums / touched
    np.add.at(squares, row, np.square(part.row_deltas - mean[row]))
    hidden = mean - z * np.sqrt(squares / touched)
    bad = attackers[part.owners]
    return replace(part, row_deltas=np.where(bad[:, None], hidden[row], part.row_deltas).astype(np.float32))


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.attack(
        "alie",
        "fedtower.plugins.attacks.alie:ALIE",
        summary="hidden in the spread, all on one side",
        capabilities={"whole_cohort": True},
    )
