"""Norm bounding: by hand, rows within the same norm, and the promises where it shortens."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.errors import RecipeError
from fedtower.core.testing.aggregator import AggregatorPromises
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.norm_bound import NormBound


def test_two_clients_by_hand() -> None:
    # (3, 4) is 5 long and is halved to 2.5; (0.6, 0.8) is 1 long and stays.
    block = Updates(np.array([1.0, 3.0]), {"w": np.array([[3, 4], [0.6, 0.8]], dtype=np.float32)})
    total, _ = NormBound(norm=2.5).fold(iter([block]), {})
    np.testing.assert_allclose(total.dense["w"][0], [(1.5 + 3 * 0.6) / 4, (2 + 3 * 0.8) / 4], rtol=1e-6)
    alike, _ = NormBound(norm=2.5, weights="equal").fold(iter([block]), {})
    np.testing.assert_allclose(alike.dense["w"][0], [(1.5 + 0.6) / 2, (2 + 0.8) / 2], rtol=1e-6)


def test_rows_and_parameters_are_one_vector() -> None:
    rows = Rows(np.array([0, 2]), np.array([4, 9]), np.array([[2], [4]], dtype=np.float32))
    block = Updates(np.ones(1), {"w": np.array([[4]], dtype=np.float32)}, {"item": rows})  # 6 long
    total, _ = NormBound(norm=3.0).fold(iter([block]), {})
    assert total.dense["w"].tolist() == [[2]]
    assert total.rows["item"].row_deltas.tolist() == [[1], [2]]


def test_nobody_moves_the_mean_by_more_than_the_bound_s_share() -> None:
    said = np.ones((10, 3), dtype=np.float32) * 0.01
    said[3] = -1e6
    total, _ = NormBound(norm=1.0).fold(iter([Updates(np.ones(10), {"w": said})]), {})
    assert np.linalg.norm(total.dense["w"][0]) <= 1.0 / 10 + 0.02


def test_a_bound_is_positive() -> None:
    with pytest.raises(RecipeError, match=r"aggregator\.norm must be positive"):
        NormBound(norm=0.0)


class TestShortening(AggregatorPromises):
    make = staticmethod(lambda: NormBound(norm=0.5))
    shortens = True
