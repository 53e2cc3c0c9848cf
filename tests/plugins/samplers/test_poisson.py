"""Poisson cohorts: everyone at the given rate, independently of the others, and what drawing them costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.plugins.samplers.poisson import Poisson

ROUNDS, CLIENTS = 2000, 200


@dataclass(frozen=True)
class Noted(Draws):
    """Draws that note the positions that were drawn."""

    positions: list[int] = field(default_factory=list)

    def bits(self, purpose: str, *key: int | NDArray[np.int64]) -> NDArray[np.int64]:
        self.positions.extend(np.ravel(key[-1]).tolist())
        return super().bits(purpose, *key)


def taking_part(rate: float) -> NDArray[np.float64]:
    """Who took part in which round, (ROUNDS, CLIENTS), as 0 and 1."""
    there = np.zeros((ROUNDS, CLIENTS))
    for round in range(ROUNDS):
        there[round, Poisson(client_rate=rate).sample(round, CLIENTS, Draws(7)).clients] = 1
    return there


def off(hits: float, tries: int, rate: float) -> float:
    """By how many standard deviations a count differs from its expectation."""
    return abs(hits - tries * rate) / math.sqrt(tries * rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_everyone_takes_part_at_the_rate_and_on_their_own(rate: float) -> None:
    there = taking_part(rate)
    tries = there.size
    assert off(there.sum(), tries, rate) < 4
    # First and last of the population are no exception, nor is anybody in between (chi-square over the clients).
    chi_square = np.square(there.sum(axis=0) - ROUNDS * rate).sum() / (ROUNDS * rate * (1 - rate))
    assert abs(chi_square - CLIENTS) < 4 * math.sqrt(2 * CLIENTS)
    assert off(there[:, 0].sum(), ROUNDS, rate) < 4
    assert off(there[:, -1].sum(), ROUNDS, rate) < 4
    # Whether one's neighbour takes part, and whether one took part a round ago, makes no difference.
    beside, before = there[:, 1:] * there[:, :-1], there[1:] * there[:-1]
    assert off(beside.sum(), beside.size, rate**2) < 5
    assert off(before.sum(), before.size, rate**2) < 5
    # So the size of a cohort is binomial.
    sizes = there.sum(axis=1)
    assert np.var(sizes) == pytest.approx(CLIENTS * rate * (1 - rate), rel=0.15)


def test_a_rate_of_one_takes_everyone() -> None:
    assert Poisson(client_rate=1).sample(3, 5, Draws(7)).clients.tolist() == [0, 1, 2, 3, 4]


def test_a_cohort_may_be_empty() -> None:
    assert len(Poisson(client_rate=1e-9).sample(3, 1000, Draws(7))) == 0
    assert len(Poisson(client_rate=0.5).sample(3, 0, Draws(7))) == 0


@pytest.mark.parametrize("rate", [1e-300, 1e-12, 1 - 1e-12])
def test_extreme_rates_are_survived(rate: float) -> None:
    cohort = Poisson(client_rate=rate).sample(3, 1_000, Draws(7))
    assert len(cohort) == (1_000 if rate > 0.5 else 0)


def test_drawing_costs_what_the_cohort_does_and_not_what_the_population_does() -> None:
    for population in (10_000, 100_000_000):
        draws = Noted(7)
        cohort = Poisson(client_rate=500 / population).sample(1, population, draws)
        assert 400 < len(cohort) < 600
        assert len(draws.positions) < 2 * 500 + 200


def test_no_draw_is_used_twice_when_the_first_ones_do_not_reach_the_end() -> None:
    longest = 0
    for round in range(20):
        draws = Noted(7)
        Poisson(client_rate=0.5).sample(round, 50_000, draws)
        assert draws.positions == list(range(len(draws.positions)))
        longest = max(longest, len(draws.positions))
    assert longest > 25_064, "in some round the first draws did not suffice"


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(RecipeError, match=r"cohort\.client_rate must be above 0 and at most 1"):
        Poisson(client_rate=rate)
