"""Krum and multi-Krum: the update that lies nearest to its neighbours, or the mean of several such.

Blanchard et al., 2017, https://papers.nips.cc/paper/6617.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.consensus import Consensus, assumed, gathered, refuse_rule
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates

State = Mapping[str, NDArray[Any]]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Krum:
    r"""Of n clients, f of them assumed to be attackers, the one with the smallest sum of squared distances to its
    :math:`n - f - 2` nearest others, or the mean of the ``select`` best; clients count alike.

    The shared parameters are one vector, and each row is one, among the clients that touched it; a row that fewer than
    ``rows_least`` touched does not move. The rule needs n to be 2 f + 3 or more: of fewer clients fewer are assumed to
    attack, and of one or two, none. Equal sums go to the smaller id. The cohort is held in memory, and there are n x n
    distances.
    """

    attackers: float = field(default=0.1, metadata={"help": "the share of clients that may be attackers"})
    select: int = field(
        default=1,
        metadata={
            "help": "how many of the best are averaged: 1 is Krum, more are multi-Krum; 0: all but the attackers"
        },
    )
    rows_least: int = field(default=3, metadata={"help": "a row that fewer clients touched does not move"})

    def __post_init__(self) -> None:
        refuse_rule(self.attackers, self.rows_least)
        if self.select < 0:
            raise RecipeError(f"aggregator.select must be at least 0, not {self.select}")

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        return Consensus(gathered(blocks), self.rows_least).by_vector(self._chosen), state

    def _chosen(self, distances: FloatArray, weights: FloatArray) -> FloatArray:
        clients = distances.shape[1]
        attackers = min(assumed(self.attackers, clients), max((clients - 3) // 2, 0))
        nearest = np.sort(distances, axis=2)[:, :, 1 : max(clients - attackers - 2, 1) + 1]  # the first is itself
        best = np.argsort(nearest.sum(axis=2), axis=1, kind="stable")
        count = min(self.select or clients, clients - attackers)
        shares = np.zeros_like(weights)
        np.put_along_axis(shares, best[:, :count], 1 / count, axis=1)
        return shares


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.aggregator(
        "krum",
        "fedtower.plugins.aggregators.krum:Krum",
        summary="the update nearest to its neighbours, or the mean of several",
        capabilities={"example": {"rows_least": 1}},
    )
