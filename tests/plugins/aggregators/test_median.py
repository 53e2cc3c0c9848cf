"""Coordinate-wise median: by hand, rows over those who touched them, and what less than half of the clients can do."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.errors import RecipeError
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.median import Median


def cohort() -> Updates:
    """Four clients, of whom the last has no examples; row 5 is touched by all, row 8 by two, row 9 by one."""
    return Updates(
        weights=np.array([1.0, 30.0, 2.0, 0.0]),
        dense={"w": np.array([[1, 9], [100, 2], [3, 3], [999, 999]], dtype=np.float32)},
        rows={
            "item": Rows(
                np.array([0, 2, 4, 6, 7]),
                np.array([5, 8, 5, 8, 5, 9, 5]),
                np.array([[1], [2], [-1000], [4], [3], [7], [999]], dtype=np.float32),
            )
        },
        clients=np.array([10, 20, 30, 40]),
    )


def test_four_clients_by_hand() -> None:
    total, state = Median(rows_least=1).fold(iter([cohort()]), {})
    assert total.dense["w"].tolist() == [[3, 3]]
    assert total.weights.tolist() == [3], "of clients with examples; what they say they have does not count"
    item = total.rows["item"]
    assert item.row_ids.tolist() == [5, 8, 9]
    assert item.row_deltas.tolist() == [[1], [3], [7]]
    assert item.row_weights is not None
    assert item.row_weights.tolist() == [3, 2, 1]
    assert state == {}


@pytest.mark.parametrize(("least", "moved"), [(1, [5, 8, 9]), (2, [5, 8]), (3, [5]), (4, [])])
def test_a_row_that_too_few_touched_does_not_move(least: int, moved: list[int]) -> None:
    total, _ = Median(rows_least=least).fold(iter([cohort()]), {})
    assert total.rows["item"].row_ids.tolist() == moved
    assert total.rows["item"].row_deltas.shape == (len(moved), 1)


def test_a_row_needs_somebody() -> None:
    with pytest.raises(RecipeError, match=r"aggregator\.rows_least must be at least 1"):
        Median(rows_least=0)
