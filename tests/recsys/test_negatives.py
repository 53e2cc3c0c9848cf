"""Negatives: uniform over what a client left, and the same whoever else is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys import negatives as drawing
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.negatives import uniform_negatives

PopulationOf = Callable[..., EventTable]

DRAWS = Draws(11)


def negatives(population: EventTable, clients: list[int], steps: int, count: int, round: int = 1) -> Any:
    return uniform_negatives(population.events(np.array(clients)), population.num_items, steps, count, DRAWS, round)


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 19), max_size=19), min_size=1, max_size=5).filter(any), st.integers(1, 3))
def test_none_is_an_item_that_the_client_touched(
    population_of: PopulationOf, touched: list[set[int]], steps: int
) -> None:
    drawn = negatives(population_of([sorted(items) for items in touched], 20), list(range(len(touched))), steps, 30)
    assert drawn.shape == (len(touched), steps, 30)
    assert ((drawn >= 0) & (drawn < 20)).all()
    for client, items in enumerate(touched):
        assert not items & set(drawn[client].ravel().tolist())


def is_uniform(counts: Any) -> bool:
    """Pearson's chi-square of the counts is within four deviations of its mean: neither too uneven nor too even."""
    expected, freedom = counts.mean(), counts.size - 1
    return bool(abs(np.square(counts - expected).sum() / expected - freedom) < 4 * np.sqrt(2 * freedom))


@pytest.mark.parametrize("touched", [0, 5, 15, 28])
def test_every_other_item_is_drawn_equally_often(population_of: PopulationOf, touched: int) -> None:
    seen = DRAWS.permutation(30, "seen")[:touched]
    drawn = negatives(population_of([seen, [3]], 30), [0], steps=30, count=1000)
    counts = np.delete(np.bincount(drawn.ravel(), minlength=30), seen)
    assert counts.sum() == 30_000
    assert is_uniform(counts)


def test_no_draw_tells_of_the_next(population_of: PopulationOf) -> None:
    drawn = negatives(population_of([[3]], 10), [0], steps=100, count=101)[0]
    pairs = np.zeros((10, 10))
    np.add.at(pairs, (drawn[:, :-1].ravel(), drawn[:, 1:].ravel()), 1)
    assert is_uniform(np.delete(np.delete(pairs, 3, axis=0), 3, axis=1))


def test_a_client_gets_the_same_in_any_block_and_for_any_number_of_steps(population_of: PopulationOf) -> None:
    population = population_of([list(range(15)), [1, 2], [19], [4]], 20)
    together = negatives(population, [3, 0, 2], steps=3, count=6)
    for place, client in enumerate([3, 0, 2]):
        assert_same_bits(negatives(population, [client], steps=2, count=4)[0], together[place, :2, :4])


def test_rounds_clients_and_steps_draw_differently(population_of: PopulationOf) -> None:
    population = population_of([[1], [1]], 1000)
    drawn = [*negatives(population, [0, 1], 2, 50).reshape(4, 50), *negatives(population, [0], 1, 50, round=2)[0]]
    assert len({tuple(row.tolist()) for row in drawn}) == 5


def test_who_left_one_item_is_given_that_one(population_of: PopulationOf) -> None:
    population = population_of([[item for item in range(400) if item != 77], [5]], 400)
    assert set(negatives(population, [0], steps=2, count=20).ravel().tolist()) == {77}


def test_a_catalogue_too_large_for_a_table_of_bits_draws_the_same(
    population_of: PopulationOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    population = population_of([list(range(15)), [1, 2], [item for item in range(20) if item != 7]], 20)
    small = negatives(population, [0, 2, 1], steps=3, count=30)
    monkeypatch.setattr(drawing, "_LARGEST_TABLE", 0)
    assert_same_bits(negatives(population, [0, 2, 1], steps=3, count=30), small)


def test_it_is_the_first_attempt_that_is_not_refused(population_of: PopulationOf) -> None:
    touched = np.arange(15)
    drawn = negatives(population_of([touched.tolist()], 20), [0], steps=1, count=60)[0, 0]
    for position, item in enumerate(drawn.tolist()):
        attempts = (int(DRAWS.integers(20, "negatives", 1, 0, 0, position, attempt)) for attempt in range(32))
        assert item == next(attempt for attempt in attempts if attempt not in touched)


def test_who_touched_everything_is_refused(population_of: PopulationOf) -> None:
    population = population_of([[0], list(range(6))], 6)
    with pytest.raises(DataError, match=r"client 1 has touched all of the 6 items.*leave such clients out"):
        negatives(population, [0, 1], steps=1, count=1)


def test_nobody_gets_none(population_of: PopulationOf) -> None:
    assert negatives(population_of([[0]], 6), [], steps=2, count=3).shape == (0, 2, 3)
