"""Uniform cohorts: a fixed number of clients without replacement, in time that does not grow with the population."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@dataclass(frozen=True)
class Uniform:
    """``size`` distinct clients, each set of them equally likely; everybody when the population is smaller."""

    size: int = field(metadata={"help": "clients a round; everybody where there are fewer"})

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RecipeError(f"cohort.size must be at least 1, not {self.size}")

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        if 2 * self.size >= population:
            chosen = draws.permutation(population, "cohort", round)[: self.size]
            return Cohort(round, np.sort(chosen), population)
        # Draw in sequence and pass over repeats: fewer than two draws a client, whatever the population.
        candidates = draws.integers(population, "cohort", round, np.arange(4 * self.size + 32, dtype=np.int64))
        distinct, first = np.unique(candidates, return_index=True)
        chosen = distinct[np.argsort(first)][: self.size]
        return Cohort(round, np.sort(chosen), population)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.sampler(
        "uniform",
        "fedtower.plugins.samplers.uniform:Uniform",
        summary="a fixed number of clients, without replacement",
        capabilities={"example": {"size": 10}},
    )
