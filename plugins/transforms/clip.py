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

# Each product is rounded to 24 bits, perhaps upwards; with this much less, not one update passes the bound.
ROUNDING = 1.0 - 2.0**-23


@dataclass(frozen=True)
class Clip:
    r"""Each client's update times :math:`\min(1, \text{norm} / \lVert\Delta\rVert_2)`, dense parameters and rows
    together.

    The metric ``clipped`` is 1 for a client whose update was shortened. An update that is not finite has no norm; it
    passes as it is, for the server to refuse.
    """

    norm: float = field(metadata={"help": "the longest that an update may be (L2)"})

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise RecipeError(f"the norm of the transform 'clip' must be positive, not {self.norm}")

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return {}

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        length = updates.norms
        long = np.isfinite(length) & (length > self.norm)
        factor = np.ones(len(updates))
        factor[long] = self.norm / length[long] * ROUNDING
        metrics = {**updates.metrics, "clipped": long.astype(np.float64)}
        return replace(updates.scaled(factor), metrics=metrics), state

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
        capabilities={"example": {"norm": 1.0}, "bounded_norm": True, "additive": True},
    )
