"""Norm bounding: the server shortens every update that is longer than a bound, and takes the weighted mean.

Sun et al., 2019, https://arxiv.org/abs/1911.07963.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.aggregation import GridSum
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class NormBound:
    r"""The mean of the updates, each times :math:`\min(1, \text{norm} / \lVert\Delta\rVert_2)`, shared parameters and
    rows together; in one pass, with the same bits for any order.

    The transform ``clip`` does this on the client, where an attacker leaves it out. A client may still put all of its
    length into one row: with ``rows.average = "cohort"`` that moves by its share of the cohort, and not of those who
    touched the row.
    """

    norm: float = field(metadata={"help": "the longest that an update may count (L2)"})
    weights: Literal["examples", "equal"] = field(
        default="examples", metadata={"help": "weigh clients by the examples of the visit, or all alike"}
    )

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise RecipeError(f"aggregator.norm must be positive, not {self.norm}")

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        total = GridSum()
        for block in blocks:
            length = block.norms
            # What is not finite has no length; it passes as it is, for the sum to refuse.
            long = np.isfinite(length) & (length > self.norm)
            factors = np.divide(self.norm, length, out=np.ones(len(block)), where=long)
            weights = block.weights if self.weights == "examples" else (block.weights > 0).astype(np.float64)
            total.add(block.scaled(factors) if np.any(long) else block, weights)
        return total.total(), state


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.aggregator(
        "norm_bound",
        "fedtower.plugins.aggregators.norm_bound:NormBound",
        summary="the weighted mean of updates that the server shortens to a bound",
        capabilities={"example": {"norm": 1e9}},
    )
