"""Cohorts by number of examples: who holds more takes part more often, and then everybody counts alike.

What FedAvg lowers weighs client k by its share of all examples, ``p_k``. Where clients are drawn by that share, it is
the plain mean of a cohort that has the expectation ``sum_k p_k delta_k`` (Li et al., 2020,
https://arxiv.org/abs/1907.02189, scheme I, with replacement). Here nobody is drawn twice: client k is in a cohort with
the probability ``size p_k``, so that its weight of Horvitz and Thompson, ``p_k / (size p_k)``, is that of all others.
Systematic sampling in an order that is drawn anew each round: Madow, 1949, https://doi.org/10.1214/aoms/1177729988.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort, IntArray
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@dataclass(frozen=True)
class ByExamples:
    """``size`` distinct clients, each with a probability in proportion to its examples; to a stranger all hold equally
    many. The aggregator has to weigh all alike, or examples would count twice.
    """

    size: int = field(metadata={"help": "clients a round"})

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RecipeError(f"cohort.size must be at least 1, not {self.size}")

    def knowing(self, examples: IntArray) -> Holders:
        """The sampler of clients who hold so many ``examples`` (C,).

        Raises:
            RecipeError: somebody would have to be in a cohort more than once, or nobody holds an example.
        """
        most, total = int(examples.max(initial=0)), int(examples.sum())
        if not most:
            raise RecipeError("cohort.name = 'by_examples' draws clients by their examples, and nobody holds one")
        if self.size * most > total:
            raise RecipeError(
                f"cohort.size = {self.size} by number of examples would need client {int(examples.argmax())}, who "
                f"holds {most:,} of {total:,}, more than once in a round, and a mean without that is biased: set "
                f"cohort.size to at most {total // most}, or cohort.name = 'uniform'"
            )
        return Holders(self.size, examples)

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        return Holders(self.size, np.ones(population, dtype=np.int64)).sample(round, population, draws)


@dataclass(frozen=True, eq=False)
class Holders:
    """The sampler of clients whose ``examples`` (C,) are known; its time grows with the population.

    Of few who are there some may have to be in for certain, and the others share what is left of ``size``.
    """

    size: int
    examples: IntArray

    def among(self, clients: IntArray) -> Holders:
        """The sampler of these ``clients`` (n,) alone, who are numbered anew."""
        return Holders(self.size, self.examples[clients])

    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        if population != len(self.examples):
            raise ValueError(f"there are {population} clients, and {len(self.examples)} numbers of examples")
        order = draws.permutation(population, "cohort", round)
        certain, rest, left = _divided(self.examples[order], self.size)
        ends = np.cumsum(rest)
        # As many points as places, equally far apart along all examples: nobody holds so many as lie between two.
        apart = float(rest.sum()) / max(left, 1)
        points = (draws.uniform("cohort/start", round) + np.arange(left)) * apart
        drawn = np.searchsorted(ends, np.minimum(points, np.nextafter(float(rest.sum()), 0.0)), side="right")
        return Cohort(round, np.unique(order[np.concatenate([np.flatnonzero(certain), drawn])]), population)


def _divided(examples: IntArray, size: int) -> tuple[NDArray[np.bool_], IntArray, int]:
    """Who is in for certain, (C,), what the others hold, (C,), and how many places are left to them."""
    left = min(size, int(np.count_nonzero(examples)))
    certain, rest = np.zeros(len(examples), dtype=bool), examples
    while np.any(more := (rest > 0) & (left * rest >= rest.sum())):
        certain, rest, left = certain | more, np.where(more, 0, rest), left - int(np.count_nonzero(more))
    return certain, rest, left


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.sampler(
        "by_examples",
        "fedtower.plugins.samplers.by_examples:ByExamples",
        summary="a fixed number of clients, with probabilities in proportion to their examples",
        capabilities={"example": {"size": 10}, "weighs": True},
    )
