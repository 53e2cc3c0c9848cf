"""Poisson cohorts: every client takes part with the same probability, independently; the cohort's size varies.

The sampling that privacy amplification assumes: under one accountant, fixed sizes cost 1.7 to 2.1 times the epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@dataclass(frozen=True)
class Poisson:
    """Each client with probability ``client_rate``; the time grows with the cohort, not with the population.

    The gaps between chosen clients are geometric (Devroye, 1986, chapter X.2), so only the chosen ones are drawn. A
    cohort may come out empty.
    """

    client_rate: float = field(metadata={"help": "probability with which each client takes part in a round"})

    def __post_init__(self) -> None:
        if not 0 < self.client_rate <= 1:
            raise RecipeError(f"cohort.client_rate must be above 0 and at most 1, not {self.client_rate}")

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        if self.client_rate == 1:
            return Cohort(round, np.arange(population, dtype=np.int64), population)
        chosen: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        last, taken = -1, 0
        while last < population:
            width = int(self.client_rate * (population - last)) + 64
            u = draws.uniform("cohort", round, np.arange(taken, taken + width, dtype=np.int64))
            gaps = np.minimum(np.floor(np.log1p(-u) / np.log1p(-self.client_rate)), population).astype(np.int64)
            places = last + np.cumsum(gaps + 1)
            chosen.append(places[places < population])
            last, taken = int(places[-1]), taken + width
        return Cohort(round, np.concatenate(chosen), population)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.sampler(
        "poisson",
        "fedtower.plugins.samplers.poisson:Poisson",
        summary="every client with the same probability, independently",
        capabilities={"example": {"client_rate": 0.1}},
    )
