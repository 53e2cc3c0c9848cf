from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.errors import RecipeError
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.attacks.sign_flip import SignFlip


def test_an_attacker_sends_the_opposite_times_the_scale_rows_too() -> None:
    rows = Rows(np.array([0, 1, 2]), np.array([4, 4]), np.array([[1.0], [2.0]], dtype=np.float32))
    block = Updates(weights=np.ones(2), dense={"x": np.array([[1.0], [2.0]], dtype=np.float32)}, rows={"item": rows})
    sent = SignFlip(scale=100.0).sent(block, np.array([False, True]))
    assert sent.dense["x"].tolist() == [[1.0], [-200.0]]
    assert sent.rows["item"].row_deltas.tolist() == [[1.0], [-200.0]]


def test_a_scale_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"attack\.scale must be above 0, not 0"):
        SignFlip(scale=0)
