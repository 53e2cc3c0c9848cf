"""Staleness: how far behind an update is, what it still counts, and the settings of rounds that do not wait.

FedBuff: Nguyen et al., 2022, https://arxiv.org/abs/2106.06639. The weights are those of FedAsync: Xie et al., 2019,
https://arxiv.org/abs/1903.03934.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.updates import Updates

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class AsynchronousSettings:
    """Rounds that wait for nobody: every ``buffer`` updates make a step, whichever version they were trained from."""

    buffer: int = field(metadata={"help": "updates that make a step (FedBuff's K)"})
    concurrency: int = field(metadata={"help": "clients that work at once, at most"})
    max_staleness: int = field(
        default=20, metadata={"help": "an update that is more versions behind than this is refused"}
    )
    staleness: Literal["polynomial", "constant", "hinge"] = field(
        default="polynomial", metadata={"help": "how much less an update counts that is behind; constant: no less"}
    )
    exponent: float = field(default=0.5, metadata={"help": "polynomial: a of (1 + staleness)^-a"})
    slope: float = field(default=1.0, metadata={"help": "hinge: a of 1 / (1 + a (staleness - b))"})
    grace: int = field(default=4, metadata={"help": "hinge: b, how far behind an update still counts whole"})

    def __post_init__(self) -> None:
        for name, least in (("buffer", 1), ("concurrency", 1), ("max_staleness", 0), ("grace", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"asynchronous.{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("exponent", "slope"):
            if not 0 <= getattr(self, name) < np.inf:
                raise RecipeError(
                    f"asynchronous.{name} must be 0 or more, not {getattr(self, name)}: stale updates "
                    f"would count more than fresh ones"
                )

    def factors(self, behind: IntArray) -> FloatArray:
        """What updates that are ``behind`` (C,) versions count, (C,), each above 0 and at most 1.

        >>> AsynchronousSettings(buffer=1, concurrency=1).factors(np.array([0, 3]))
        array([1. , 0.5])
        """
        if self.staleness == "constant":
            return np.ones(len(behind))
        if self.staleness == "polynomial":
            return np.asarray((1.0 + behind) ** -self.exponent)
        return np.asarray(1.0 / (1.0 + self.slope * np.maximum(behind - self.grace, 0)))


def discounted(block: Updates, factors: FloatArray) -> Updates:
    """The block with every client's deltas times its factor (C,).

    The deltas are scaled and the weights are not: a mean divides by the weights, so that of updates that are all
    equally stale, or of a single one, it would be as long as if they were fresh. Both papers make the step shorter.
    """
    if np.all(factors == 1.0):
        return block
    scale = factors.astype(np.float32)
    dense = {name: delta * scale.reshape(-1, *([1] * (delta.ndim - 1))) for name, delta in block.dense.items()}
    rows = {
        table: replace(part, row_deltas=part.row_deltas * scale[part.owners][:, None])
        for table, part in block.rows.items()
    }
    return replace(block, dense=dense, rows=rows)
