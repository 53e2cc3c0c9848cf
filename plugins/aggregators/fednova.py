"""FedNova: what clients learnt is averaged by the step, so that who took more steps does not pull harder.

Wang et al., 2020, https://arxiv.org/abs/2007.07481, with as many effective steps as federated averaging takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.aggregation import GridSum
from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates

State = Mapping[str, NDArray[Any]]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class FedNova:
    r""":math:`\bigl(\sum_c p_c\, a_c\bigr) \sum_c p_c\, \Delta_c / a_c`, where :math:`p_c` is a client's share of the
    examples and :math:`a_c` what its steps add up to under a gradient that stays the same.

    That is the number of steps (the metric ``steps``, which clients say themselves) for plain descent and for rows, and
    more or less than it with momentum or FedProx's pull. A row's mean is over the clients that touched it. Who does not
    say how many steps, or says that they are not one at least, has no weight. In one pass, with the same bits for any
    order.
    """

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        return Normalised(lambda steps: steps).fold(blocks, state)

    def instructed(self, plan: Plan) -> Normalised:
        """What folds the updates that answer this plan."""
        return Normalised(reach_of(plan.local))


@dataclass(frozen=True)
class Normalised:
    """FedNova for one kind of visit; ``reach`` says of numbers of steps (C,) what they add up to."""

    reach: Callable[[FloatArray], FloatArray]

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        """The total of a cohort."""
        total, weighed = GridSum(), _Means()
        for block in blocks:
            said = block.metrics.get("steps", np.full(len(block), np.nan))
            told = np.isfinite(said) & (said >= 1)
            steps = np.where(told, said, 1.0)
            reach, weights = self.reach(steps), np.where(told, block.weights, 0.0)
            total.add(block.scaled(1 / reach, 1 / steps), weights)
            weighed.add(weights, reach, steps)
        if not weighed.weight:
            raise UpdateError(
                "there is nothing to normalise: no update with weight says how many steps it took (the metric 'steps', "
                "which fedtower.core.runtime.as_updates gives)"
            )
        mean, reach_of_all, steps_of_all = total.total(), weighed.mean(0), weighed.mean(1)
        return mean.scaled(np.array([reach_of_all]), np.array([steps_of_all])), state


class _Means:
    """Weighted means of values of each client, rounded once whatever their order."""

    def __init__(self) -> None:
        self._weights: list[float] = []
        self._terms: tuple[list[float], list[float]] = ([], [])

    def add(self, weights: FloatArray, *values: FloatArray) -> None:
        """Take in the values (C,) of a block."""
        self._weights += weights.tolist()
        for terms, each in zip(self._terms, values, strict=True):
            terms += (weights * each).tolist()

    @property
    def weight(self) -> float:
        """Of all."""
        return math.fsum(self._weights)

    def mean(self, which: int) -> float:
        """Of the values given at this place."""
        return math.fsum(self._terms[which]) / self.weight


def reach_of(local: LocalSettings) -> Callable[[FloatArray], FloatArray]:
    """How far, in rates, so many steps go under a gradient that stays the same: the L1 norm of the paper's a.

    Raises:
        RecipeError: an optimiser whose steps depend on more than the sum of its gradients.
    """
    pull, kept = local.lr * local.proximal, local.momentum if local.optimizer == "momentum" else 0.0
    refused = local.control != "none" or local.head_first > 0
    if local.optimizer not in ("sgd", "momentum") or (kept and pull) or pull >= 1 or refused:
        what = f"local.optimizer = {local.optimizer!r}" + (f" with local.proximal = {local.proximal}" if pull else "")
        what += f" with local.control = {local.control!r}" if local.control != "none" else ""
        what += f" with local.head_first = {local.head_first}" if local.head_first else ""
        raise RecipeError(
            f"aggregator 'fednova' divides an update by what its steps add up to, and for {what} it cannot tell that; "
            f"set local.optimizer = 'sgd' (with local.proximal below 1 / local.lr) or 'momentum', or aggregator.name = "
            f"'fedavg'"
        )
    if kept:
        return lambda steps: (steps - kept * (1 - kept**steps) / (1 - kept)) / (1 - kept)
    return (lambda steps: (1 - (1 - pull) ** steps) / pull) if pull else (lambda steps: steps)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.aggregator(
        "fednova",
        "fedtower.plugins.aggregators.fednova:FedNova",
        summary="the mean by the step, where clients take different numbers of them",
        capabilities={"weighs": True},
    )
