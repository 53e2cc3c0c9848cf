"""FedYogi: the paper's steps by hand, in plain numbers, and what sets it apart from Adam."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtower.core.errors import RecipeError
from fedtower.plugins.server_optimizers.yogi import Yogi


def test_it_steps_as_the_paper_says() -> None:
    beta1, beta2, tau, lr = 0.9, 0.8, 0.1, 0.3
    x, m, v = 1.0, 0.0, tau**2
    optimizer, ours = Yogi(beta1=beta1, beta2=beta2, tau=tau), {"w": np.ones(1, dtype=np.float32)}
    state = optimizer.init(ours)
    for delta in (2.0, -0.01, 0.5, 3.0, 0.02, 0.0):
        m = beta1 * m + (1 - beta1) * delta
        if v > delta**2:
            v -= (1 - beta2) * delta**2
        elif v < delta**2:
            v += (1 - beta2) * delta**2
        x += lr * m / (math.sqrt(v) + tau)
        moved, state = optimizer.update(ours, {"w": np.array([delta], dtype=np.float32)}, state, lr=lr)
        ours = dict(moved)
        assert float(ours["w"][0]) == pytest.approx(x, rel=1e-5)
        assert float(state["v/w"][0]) == pytest.approx(v, rel=1e-5)


def test_after_a_large_delta_small_ones_let_the_second_moment_stay() -> None:
    optimizer, x = Yogi(beta2=0.9), {"w": np.zeros(1, dtype=np.float32)}
    _, state = optimizer.update(x, {"w": np.array([10], dtype=np.float32)}, optimizer.init(x), lr=0.1)
    before = float(state["v/w"][0])
    for _ in range(50):
        _, state = optimizer.update(x, {"w": np.array([0.1], dtype=np.float32)}, state, lr=0.1)
    assert float(state["v/w"][0]) == pytest.approx(before - 50 * 0.1 * 0.01, rel=1e-4), "Adam would have left 0.5 %"


@pytest.mark.parametrize(
    ("name", "value"), [("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("beta2", -0.1), ("tau", 0.0)]
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"server.{name} must be"):
        Yogi(**{name: value})
