"""Federated averaging: three clients by hand, and what weighs."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from fedtower.core.errors import UpdateError
from fedtower.core.testing.aggregator import AggregatorPromises
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.fedavg import FedAvg


def three() -> Updates:
    """Clients of 1, 3 and 0 examples; all touch row 5, the second also row 8."""
    return Updates(
        weights=np.array([1.0, 3.0, 0.0]),
        dense={"w": np.array([2.0, 6.0, 100.0], dtype=np.float32)},
        rows={
            "item": Rows(
                np.array([0, 1, 3, 4]), np.array([5, 5, 8, 5]), np.array([[2], [6], [1], [100]], dtype=np.float32)
            )
        },
        clients=np.array([10, 20, 30]),
    )


@pytest.mark.parametrize(("weights", "mean", "weight"), [("examples", 20 / 4, 4), ("equal", 8 / 2, 2)])
def test_three_clients_by_hand(weights: Literal["examples", "equal"], mean: float, weight: float) -> None:
    total, state = FedAvg(weights=weights).fold(iter([three()]), {})
    assert total.dense["w"].tolist() == [mean]
    assert total.weights.tolist() == [weight]
    item = total.rows["item"]
    assert item.row_ids.tolist() == [5, 8]
    assert item.row_deltas.tolist() == [[mean], [1]]
    assert item.row_weights is not None
    assert item.row_weights.tolist() == ([4, 3] if weights == "examples" else [2, 1])
    assert state == {}


def test_nobody_with_examples_is_nothing_to_average() -> None:
    with pytest.raises(UpdateError, match="nothing to average"):
        FedAvg().fold(iter([three().slice(2, 3)]), {})


class TestWeighingAllAlike(AggregatorPromises):
    make = staticmethod(lambda: FedAvg(weights="equal"))
