"""Geometric median: known points, scipy's minimum as an oracle, and one far away."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.updates import Updates
from fedtower.plugins.aggregators.geometric_median import GeometricMedian


def folded(
    points: np.ndarray, weights: np.ndarray | None = None, aggregator: GeometricMedian | None = None
) -> np.ndarray:
    """The median of points (n, 4), which lie in two parameters."""
    dense = {"a": points[:, :2].astype(np.float32), "b": points[:, 2:].astype(np.float32)}
    block = Updates(np.ones(len(points)) if weights is None else weights, dense, clients=np.arange(len(points)))
    total, _ = (aggregator or GeometricMedian()).fold(iter([block]), {})
    return np.concatenate([total.dense["a"][0], total.dense["b"][0]])


def test_the_corners_of_an_equilateral_triangle_meet_in_its_middle() -> None:
    angles = 2 * np.pi * np.arange(3) / 3
    corners = np.stack([np.cos(angles), np.sin(angles), np.full(3, 4.0), np.full(3, -1.0)], axis=1)
    np.testing.assert_allclose(folded(corners), [0, 0, 4, -1], atol=1e-6)


def test_two_who_agree_outvote_the_third() -> None:
    said = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [70, -80, 90, 0]])
    np.testing.assert_allclose(folded(said), said[0], atol=1e-4)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("weighed", [False, True])
def test_no_point_has_a_smaller_sum_of_distances(seed: int, weighed: bool) -> None:
    draws = Draws(seed)
    points = draws.normal("points", np.arange(9 * 4)).reshape(9, 4).astype(np.float32).astype(np.float64)
    points[4] *= 50
    weights = 1.0 + draws.integers(5, "weights", np.arange(9)) if weighed else np.ones(9)

    def cost(at: np.ndarray) -> float:
        return float((weights * np.sqrt(np.square(points - at).sum(axis=1))).sum())

    found = folded(points, weights, GeometricMedian(weights="examples" if weighed else "equal"))
    best = minimize(
        cost, points.mean(axis=0), method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-9}
    )
    assert cost(found) <= best.fun * (1 + 1e-5)


def test_one_that_is_a_million_times_as_far_away_hardly_moves_it() -> None:
    points = Draws(5).normal("points", np.arange(10 * 4)).reshape(10, 4)
    moved = points.copy()
    moved[9] = 1e6
    others = folded(points[:9])
    assert np.linalg.norm(folded(moved) - others) < 0.5
    assert np.linalg.norm(moved.mean(axis=0) - others) > 1e5, "as a mean would"


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"aggregator\.iterations must be"):
        GeometricMedian(iterations=0)
    with pytest.raises(RecipeError, match=r"aggregator\.nu must be"):
        GeometricMedian(nu=0.0)
