"""FedAdam: by hand, and torch's own as an oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.plugins.server_optimizers.adam import Adam

Parameters = Mapping[str, NDArray[np.float32]]

ROUNDS = 40


def deltas(round: int) -> dict[str, NDArray[np.float32]]:
    """Large deltas and tiny ones, and one parameter that is a single number."""
    draws = Draws(5)
    return {
        "w": (draws.normal("w", round, np.arange(6)).reshape(2, 3) * 10.0 ** np.arange(-3, 0)).astype(np.float32),
        "scale": draws.normal("scale", round).astype(np.float32),
    }


@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.99, 1e-8), (0.0, 0.999, 1e-3), (0.5, 0.0, 1e-8)])
def test_it_steps_as_torch_does(beta1: float, beta2: float, eps: float) -> None:
    ours: Parameters = deltas(0)
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in ours.items()}
    optimizer = Adam(beta1=beta1, beta2=beta2, eps=eps)
    oracle = torch.optim.Adam(list(theirs.values()), lr=0.01, betas=(beta1, beta2), eps=eps)
    state = optimizer.init(ours)
    for round in range(1, ROUNDS):
        ours, state = optimizer.update(ours, deltas(round), state, lr=0.01)
        for name, delta in deltas(round).items():
            theirs[name].grad = -torch.tensor(delta)
        oracle.step()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_first_step_is_the_rate_whatever_the_size_of_the_delta() -> None:
    x = {"w": np.zeros(3, dtype=np.float32)}
    moved, _ = Adam().update(x, {"w": np.array([1e-3, -1.0, 1e3], dtype=np.float32)}, Adam().init(x), lr=0.01)
    np.testing.assert_allclose(moved["w"], [0.01, -0.01, 0.01], rtol=1e-4)


def test_without_correction_it_steps_as_the_paper_says() -> None:
    beta1, beta2, tau, lr = 0.9, 0.99, 1e-3, 0.1
    x, m, v = 1.0, 0.0, tau**2
    optimizer, ours = Adam(beta1, beta2, tau, correction=False), {"w": np.ones(1, dtype=np.float32)}
    state = optimizer.init(ours)
    for delta in (2.0, -0.01, 0.5, 3.0, 0.02, 0.0):
        m = beta1 * m + (1 - beta1) * delta
        v = beta2 * v + (1 - beta2) * delta**2
        x += lr * m / (math.sqrt(v) + tau)
        moved, state = optimizer.update(ours, {"w": np.array([delta], dtype=np.float32)}, state, lr=lr)
        ours = dict(moved)
        assert float(ours["w"][0]) == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("beta2", -0.1), ("eps", 0.0)]
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(RecipeError, match=f"server.{name} must be"):
        Adam(**settings)
