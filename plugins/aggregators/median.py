"""Coordinate-wise median: less than half of the clients, whatever they send, drag it no further than the others lie.

Yin et al., 2018, https://arxiv.org/abs/1803.01498, algorithm 1, option I.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.consensus import Consensus, gathered, refuse_rule
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Median:
    """The median of each coordinate, of an even number the mean of the two in the middle; clients count alike, because
    a weight is what a client says of itself.

    A row's median is over the clients that touched it. One of two, or the only one, is outvoted by nobody: a row that
    fewer than ``rows_least`` touched does not move. The cohort is held in memory.
    """

    rows_least: int = field(default=3, metadata={"help": "a row that fewer clients touched does not move"})

    def __post_init__(self) -> None:
        refuse_rule(0.0, self.rows_least)

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        return Consensus(gathered(blocks), self.rows_least).by_coordinate(_median), state


def _median(said: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.median(said, axis=1))


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.aggregator(
        "median",
        "fedtower.plugins.aggregators.median:Median",
        summary="the median of each coordinate",
        capabilities={"example": {"rows_least": 1}, "needs_dense": True},
    )
