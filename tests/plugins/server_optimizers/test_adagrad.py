"""FedAdagrad: the paper's steps by hand, and torch's own as an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.plugins.server_optimizers.adagrad import Adagrad


def test_it_steps_as_torch_does() -> None:
    draws = Draws(5)
    x = {"w": draws.normal("w", 0, np.arange(6)).reshape(2, 3).astype(np.float32)}
    theirs = torch.tensor(x["w"], requires_grad=True)
    oracle = torch.optim.Adagrad([theirs], lr=0.1, initial_accumulator_value=0.01**2, eps=0.01)
    optimizer, state = Adagrad(tau=0.01), Adagrad(tau=0.01).init(x)
    for round in range(1, 20):
        delta = draws.normal("w", round, np.arange(6)).reshape(2, 3).astype(np.float32)
        moved, state = optimizer.update(x, {"w": delta}, state, lr=0.1)
        x, theirs.grad = dict(moved), -torch.tensor(delta)
        oracle.step()
    np.testing.assert_allclose(x["w"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_two_steps_by_hand() -> None:
    # tau 1: v is 1, 1 + 9 and 10 + 16; m is 1.5 and 0.75 + 2.
    optimizer, x = Adagrad(beta1=0.5, tau=1.0), {"w": np.zeros(1, dtype=np.float32)}
    one, state = optimizer.update(x, {"w": np.array([3], dtype=np.float32)}, optimizer.init(x), lr=2.0)
    assert float(one["w"][0]) == pytest.approx(2 * 1.5 / (10**0.5 + 1))
    two, _ = optimizer.update(one, {"w": np.array([4], dtype=np.float32)}, state, lr=2.0)
    assert float(two["w"][0] - one["w"][0]) == pytest.approx(2 * 2.75 / (26**0.5 + 1))


@pytest.mark.parametrize(("name", "value"), [("beta1", 1.0), ("beta1", -0.1), ("tau", 0.0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"server.{name} must be"):
        Adagrad(**{name: value})
