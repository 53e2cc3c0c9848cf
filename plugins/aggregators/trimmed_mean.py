"""Coordinate-wise trimmed mean: the largest and the smallest of each coordinate are left out.

Yin et al., 2018, https://arxiv.org/abs/1803.01498, algorithm 1, option II.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.consensus import Consensus, assumed, gathered, refuse_rule
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of each coordinate without ``attackers`` of the clients at either end, rounded up; clients count alike.

    A row is trimmed by the clients that touched it, in the same share; one that fewer than ``rows_least`` touched does
    not move. Of one or two there is nothing to trim. The cohort is held in memory.
    """

    attackers: float = field(
        default=0.1, metadata={"help": "the share of clients left out at either end: as many as may be attackers"}
    )
    rows_least: int = field(default=3, metadata={"help": "a row that fewer clients touched does not move"})

    def __post_init__(self) -> None:
        refuse_rule(self.attackers, self.rows_least)

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        return Consensus(gathered(blocks), self.rows_least).by_coordinate(self._trimmed), state

    def _trimmed(self, said: NDArray[np.float64]) -> NDArray[np.float64]:
        clients = said.shape[1]
        out = assumed(self.attackers, clients)
        return np.asarray(np.sort(said, axis=1)[:, out : clients - out].mean(axis=1))


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.aggregator(
        "trimmed_mean",
        "fedtower.plugins.aggregators.trimmed_mean:TrimmedMean",
        summary="the mean of each coordinate without its largest and smallest",
        capabilities={"example": {"rows_least": 1}, "needs_dense": True},
    )
