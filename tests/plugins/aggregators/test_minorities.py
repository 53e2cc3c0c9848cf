"""What a minority can do to each rule that is meant to outvote it, by law: no more than the others lie apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.aggregation import Aggregator
from fedtower.core.testing import examples
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.aggregators.geometric_median import GeometricMedian
from fedtower.plugins.aggregators.krum import Krum
from fedtower.plugins.aggregators.median import Median
from fedtower.plugins.aggregators.trimmed_mean import TrimmedMean

RULES: dict[str, Callable[[], Aggregator]] = {
    "median": Median,
    "trimmed_mean": lambda: TrimmedMean(attackers=0.25),
    "krum": lambda: Krum(attackers=0.25),
    "multi_krum": lambda: Krum(attackers=0.25, select=0),
    "geometric_median": GeometricMedian,
}
law = settings(deadline=None, max_examples=25, derandomize=True, database=None)


def attacked(seed: int, far: float, clients: int = 12, attackers: int = 3) -> tuple[Updates, Updates]:
    """A cohort whose last three all say the same, far away, also of row 0, which everybody touches; and the others."""
    cohort = examples.updates(clients, seed=seed)
    for delta in cohort.dense.values():
        delta[-attackers:] = far
    item = cohort.rows["item"]
    item.row_deltas[item.owners >= clients - attackers] = far
    return cohort, cohort.slice(0, clients - attackers)


def of_row(rows: Rows, row: int) -> np.ndarray:
    return np.asarray(rows.row_deltas[rows.row_ids == row])


@pytest.mark.parametrize("rule", sorted(RULES))
@given(seed=st.integers(0, 1000), far=st.sampled_from([-1e7, -100.0, 1e3, 1e6]))
@law
def test_a_quarter_moves_nothing_further_than_the_others_lie(rule: str, seed: int, far: float) -> None:
    cohort, honest = attacked(seed, far)
    total, _ = RULES[rule]().fold(iter([cohort]), {})
    for name, delta in honest.dense.items():
        # The geometric median is no mean of honest ones alone: Minsker's bound, for a quarter, is within their spread.
        slack = np.ptp(delta, axis=0) if rule == "geometric_median" else 1e-5
        assert np.all(total.dense[name][0] <= delta.max(axis=0) + slack), name
        assert np.all(total.dense[name][0] >= delta.min(axis=0) - slack), name
    said = of_row(honest.rows["item"], 0)
    slack = np.ptp(said, axis=0) if rule == "geometric_median" else 1e-5
    (got,) = of_row(total.rows["item"], 0)
    assert np.all(got <= said.max(axis=0) + slack)
    assert np.all(got >= said.min(axis=0) - slack)


def test_undefended_a_quarter_has_its_way() -> None:
    cohort, honest = attacked(1, 1e6)
    total, _ = FedAvg(weights="equal").fold(iter([cohort]), {})
    assert all(np.all(total.dense[name][0] > delta.max(axis=0) + 1e5) for name, delta in honest.dense.items())


@pytest.mark.parametrize("rule", sorted(RULES))
def test_what_a_client_says_of_its_weight_gives_it_no_more_votes(rule: str) -> None:
    cohort = examples.updates(9)
    plain, _ = RULES[rule]().fold(iter([cohort]), {})
    cohort.weights[4] = 1e9
    boasting, _ = RULES[rule]().fold(iter([cohort]), {})
    for name, delta in plain.dense.items():
        np.testing.assert_array_equal(boasting.dense[name], delta)
