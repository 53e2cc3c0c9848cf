"""Uniform cohorts: their size, how likely each set of clients is, and what drawing them costs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.plugins.samplers.uniform import Uniform


@dataclass(frozen=True)
class Counted(Draws):
    """Draws that note how many were made."""

    made: list[int] = field(default_factory=list)

    def bits(self, purpose: str, *key: int | NDArray[np.int64]) -> NDArray[np.int64]:
        drawn = super().bits(purpose, *key)
        self.made.append(drawn.size)
        return drawn


@pytest.mark.parametrize("population", [1, 9, 10, 19, 20, 21, 1000, 2_000_000_000])
def test_the_size_is_fixed_unless_there_are_too_few(population: int) -> None:
    for round in range(1, 30):
        assert len(Uniform(size=10).sample(round, population, Draws(7))) == min(10, population)


# Below twice the size the cohort is cut from a permutation, from there on clients are drawn one by one.
@pytest.mark.parametrize(("population", "sets"), [(4, 6), (5, 10), (7, 21)])
def test_every_set_of_clients_is_equally_likely(population: int, sets: int) -> None:
    rounds = 100 * sets
    cohorts = (Uniform(size=2).sample(round, population, Draws(7)).clients for round in range(rounds))
    counts = Counter(tuple(clients.tolist()) for clients in cohorts)
    assert len(counts) == sets
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert abs(chi_square - (sets - 1)) < 4 * math.sqrt(2 * (sets - 1))


def test_drawing_does_not_slow_down_with_the_population() -> None:
    for population in (10_000, 1_000_000_000):
        draws = Counted(7)
        Uniform(size=100).sample(1, population, draws)
        assert sum(draws.made) <= 4 * 100 + 32


def test_nobody_is_no_size() -> None:
    with pytest.raises(RecipeError, match=r"cohort\.size must be at least 1, not 0"):
        Uniform(size=0)
