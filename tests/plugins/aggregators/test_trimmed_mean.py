"""Coordinate-wise trimmed mean: by hand, and scipy's as an oracle."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import trim_mean

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.trimmed_mean import TrimmedMean


def block(values: np.ndarray) -> Updates:
    clients = len(values)
    return Updates(np.arange(1.0, clients + 1), {"w": values.astype(np.float32)}, clients=np.arange(clients))


def test_five_clients_by_hand() -> None:
    total, _ = TrimmedMean(attackers=0.2).fold(iter([block(np.array([[1], [-50], [2], [3], [1000]]))]), {})
    assert total.dense["w"].tolist() == [[2]]
    assert total.weights.tolist() == [5]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.25, 0.45])
def test_scipy_trims_the_same(share: float) -> None:
    values = Draws(3).normal("w", np.arange(20 * 7)).reshape(20, 7).astype(np.float32)
    total, _ = TrimmedMean(attackers=share).fold(iter([block(values)]), {})
    np.testing.assert_allclose(total.dense["w"][0], trim_mean(values.astype(np.float64), share, axis=0), rtol=1e-6)


def test_a_row_is_trimmed_by_those_who_touched_it() -> None:
    # All five touch row 2, the first three row 4, the first two row 6.
    ids = [[2, 4, 6], [2, 4, 6], [2, 4], [2], [2]]
    said = [[1, 900, 900], [2, 5, 900], [3, 1], [4], [-900]]
    rows = Rows(
        np.cumsum([0, *map(len, ids)]),
        np.concatenate([np.array(each) for each in ids]),
        np.concatenate([np.array(each, dtype=np.float32) for each in said])[:, None],
    )
    total, _ = TrimmedMean(attackers=0.2).fold(iter([Updates(np.ones(5), rows={"item": rows})]), {})
    assert total.rows["item"].row_ids.tolist() == [2, 4], "two clients are too few"
    assert total.rows["item"].row_deltas.tolist() == [[2], [5]]


@pytest.mark.parametrize("share", [-0.1, 0.5])
def test_half_of_the_clients_cannot_be_left_out(share: float) -> None:
    with pytest.raises(RecipeError, match="no rule outvotes half of the clients"):
        TrimmedMean(attackers=share)
