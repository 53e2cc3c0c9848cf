from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.errors import RecipeError
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.median import Median
from fedtower.plugins.attacks.alie import ALIE, hidden_by_a_majority

LAST = np.array([False, False, True])


def test_attackers_send_the_mean_less_z_deviations_of_each_coordinate() -> None:
    block = Updates(weights=np.ones(3), dense={"x": np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], dtype=np.float32)})
    sent = ALIE(z=1.5).sent(block, LAST).dense["x"]
    np.testing.assert_allclose(sent[2], [2.0 - 1.5 * np.sqrt(2 / 3), 5.0], rtol=1e-6)
    assert sent[:2].tolist() == [[1.0, 5.0], [2.0, 5.0]]


def test_a_row_s_mean_is_of_those_who_touched_it() -> None:
    deltas = np.array([[1.0], [7.0], [3.0], [9.0]], dtype=np.float32)
    rows = Rows(np.array([0, 1, 2, 4]), np.array([4, 6, 4, 5]), deltas)  # row 4: 1 and 3; row 5: the attacker alone
    sent = ALIE(z=2.0).sent(Updates(weights=np.ones(3), rows={"item": rows}), LAST).rows["item"]
    assert sent.row_deltas[:, 0].tolist() == [1.0, 7.0, 2.0 - 2.0 * 1.0, 9.0]


def test_z_is_the_paper_s_where_none_is_given() -> None:
    """Of 50 with 24 attackers, 2 honest ones are needed, and so 24 of 26 may lie nearer: the 92nd percentile."""
    assert hidden_by_a_majority(50, 24) == pytest.approx(1.426, abs=1e-3)
    assert hidden_by_a_majority(50, 26) == hidden_by_a_majority(3, 0) == 0.0
    values = np.arange(50, dtype=np.float32)[:, None]
    sent = ALIE().sent(Updates(weights=np.ones(50), dense={"x": values}), np.arange(50) >= 26).dense["x"]
    assert sent[49, 0] == pytest.approx(24.5 - hidden_by_a_majority(50, 24) * values.std(), rel=1e-6)


def test_a_median_does_not_see_them_as_far_away() -> None:
    """Which is what the attack is for: hidden among the others, they still pull the median their way."""
    values = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    honest = Updates(weights=np.ones(50), dense={"x": values}, clients=np.arange(50))
    sent = ALIE().sent(honest, np.arange(50) % 25 < 12)
    assert np.abs(sent.dense["x"]).max() <= 1.0
    before, after = (Median().fold([block], {})[0].dense["x"].item() for block in (honest, sent))
    assert after < before - 0.4


@pytest.mark.parametrize("z", [0.0, -1.0, float("nan")])
def test_a_z_that_is_none_is_refused(z: float) -> None:
    with pytest.raises(RecipeError, match=r"attack\.z must be above 0"):
        ALIE(z=z)
