"""What every sampler promises."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.cohort import Cohort, Sampler
from fedtower.core.draws import Draws
from fedtower.core.testing.promises import Promises, assert_same_bits


class SamplerPromises(Promises):
    """``make`` gives a sampler whose cohorts are small beside 1,000 clients."""

    @pytest.mark.parametrize("population", [1, 2, 17, 1_000])
    def test_clients_are_distinct_and_of_the_population(self, population: int) -> None:
        sampler: Sampler = self.made()
        for round in range(1, 6):
            cohort = sampler.sample(round, population, Draws(7))
            assert isinstance(cohort, Cohort)  # which checks that its clients are sorted, distinct and in range
            assert cohort.clients.dtype == np.int64
            assert (cohort.round, cohort.population) == (round, population)

    def test_the_same_draws_give_the_same_cohort(self) -> None:
        for round in (1, 2, 50):
            assert_same_bits(self.made().sample(round, 300, Draws(7)), self.made().sample(round, 300, Draws(7)))

    def test_earlier_rounds_do_not_matter(self) -> None:
        sampler: Sampler = self.made()
        forwards = [sampler.sample(round, 300, Draws(7)) for round in (1, 2, 3)]
        backwards = [sampler.sample(round, 300, Draws(7)) for round in (3, 2, 1)]
        assert_same_bits(forwards, backwards[::-1])

    def test_everyone_takes_part_sooner_or_later(self) -> None:
        sampler: Sampler = self.made()
        seen = {int(client) for round in range(1, 501) for client in sampler.sample(round, 20, Draws(7)).clients}
        assert seen == set(range(20)), f"clients {sorted(set(range(20)) - seen)} never took part in 500 rounds"

    def test_cohorts_change_from_round_to_round(self) -> None:
        sampler: Sampler = self.made()
        assert len({sampler.sample(round, 1_000, Draws(7)).clients.tobytes() for round in range(1, 21)}) > 1
