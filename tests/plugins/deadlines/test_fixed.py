"""A fixed deadline: it stays."""

from __future__ import annotations

import numpy as np
import pytest

from fedtower.core.deadline import Arrivals
from fedtower.core.errors import RecipeError
from fedtower.plugins.deadlines.fixed import Fixed


def test_it_stays_whatever_comes() -> None:
    deadline = Fixed(seconds=8.0)
    state, why = deadline.learn(deadline.init(), Arrivals(1, 5, 5, np.zeros(0), 8.0, 8.0))
    assert (deadline.limit(state), why) == (8.0, "")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_at_all_is_refused(seconds: float) -> None:
    with pytest.raises(RecipeError, match=r"deadline\.seconds must be above 0"):
        Fixed(seconds)
