"""Cohort: clients that a transport can rely on."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.cohort import Cohort
from fedtower.core.errors import FedtowerError


@pytest.mark.parametrize("clients", [[], [0], [4], [0, 1, 2, 3, 4]])
def test_sorted_distinct_clients_of_the_population_are_a_cohort(clients: list[int]) -> None:
    assert len(Cohort(3, np.array(clients, dtype=np.int64), 5)) == len(clients)


@pytest.mark.parametrize("clients", [[1, 0], [1, 1], [-1, 2], [4, 5]])
def test_anything_else_is_refused_and_says_whose_fault_it_is(clients: list[int]) -> None:
    with pytest.raises(FedtowerError, match=r"round 3 must be sorted, distinct clients from 0 to 4.*a sampler, or"):
        Cohort(3, np.array(clients, dtype=np.int64), 5)
