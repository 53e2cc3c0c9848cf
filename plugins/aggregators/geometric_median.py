"""Geometric median: the point with the smallest sum of distances to all updates, by the smoothed Weiszfeld algorithm.

Pillutla et al., 2022, https://arxiv.org/abs/1912.13445 (RFA).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.consensus import Consensus, gathered, refuse_rule
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates

State = Mapping[str, NDArray[Any]]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class GeometricMedian:
    r"""The mean of the updates by :math:`w_c / \max(\nu, \lVert \Delta_c - z \rVert)`, where z is that mean: from the
    plain mean on, until it stands still.

    The shared parameters are one vector, and each row is one, among the clients that touched it; a row that fewer than
    ``rows_least`` touched does not move. The cohort is held in memory, and there are n x n distances; steps are taken
    on these, and cost nothing of the size of a model.
    """

    weights: Literal["examples", "equal"] = field(
        default="equal",
        metadata={"help": "weigh clients by the examples that they say they have, as the paper does, or all alike"},
    )
    iterations: int = field(default=100, metadata={"help": "at most so many steps"})
    nu: float = field(default=1e-6, metadata={"help": "a distance below this counts as this: what smooths the median"})
    rows_least: int = field(default=3, metadata={"help": "a row that fewer clients touched does not move"})

    def __post_init__(self) -> None:
        refuse_rule(0.0, self.rows_least)
        if self.iterations < 1:
            raise RecipeError(f"aggregator.iterations must be at least 1, not {self.iterations}")
        if not self.nu > 0:
            raise RecipeError(f"aggregator.nu must be positive, not {self.nu}")

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        return Consensus(gathered(blocks, self.weights), self.rows_least).by_vector(self._weiszfeld), state

    def _weiszfeld(self, distances: FloatArray, weights: FloatArray) -> FloatArray:
        shares: FloatArray = weights / weights.sum(axis=1, keepdims=True)
        for _ in range(self.iterations):
            # Of a mean by shares s, the squared distances are D s - s' D s / 2, where D holds those between the points.
            away = (distances @ shares[:, :, None])[:, :, 0]
            squares = away - (shares * away).sum(axis=1, keepdims=True) / 2
            pull = weights / np.maximum(np.sqrt(np.maximum(squares, 0.0)), self.nu)
            after = pull / pull.sum(axis=1, keepdims=True)
            still = np.abs(after - shares).max() < 1e-12
            shares = after
            if still:
                break
        return shares


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.aggregator(
        "geometric_median",
        "fedtower.plugins.aggregators.geometric_median:GeometricMedian",
        summary="the point with the smallest sum of distances to all updates",
        capabilities={"example": {"rows_least": 1}},
    )
