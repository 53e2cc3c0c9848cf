"""Server SGD: by hand, and torch's own as an oracle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.testing.server_optimizer import ServerOptimizerPromises
from fedtower.plugins.server_optimizers.sgd import SGD

Parameters = Mapping[str, NDArray[np.float32]]

ROUNDS = 12


def deltas(round: int) -> dict[str, NDArray[np.float32]]:
    draws = Draws(5)
    return {
        "w": draws.normal("w", round, np.arange(6)).reshape(2, 3).astype(np.float32),
        "b": draws.normal("b", round, np.arange(2)).astype(np.float32),
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_steps_as_torch_does(momentum: float) -> None:
    ours: Parameters = deltas(0)
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in ours.items()}
    optimizer, oracle = SGD(momentum=momentum), torch.optim.SGD(list(theirs.values()), lr=0.1, momentum=momentum)
    state = optimizer.init(ours)
    for round in range(1, ROUNDS):
        ours, state = optimizer.update(ours, deltas(round), state, lr=0.1 / round)
        oracle.param_groups[0]["lr"] = 0.1 / round
        for name, delta in deltas(round).items():
            theirs[name].grad = -torch.from_numpy(delta)
        oracle.step()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_rate_of_one_without_momentum_is_federated_averaging() -> None:
    x = {"w": np.array([1.5, -2.0], dtype=np.float32)}
    moved, state = SGD().update(x, {"w": np.array([0.25, 4.0], dtype=np.float32)}, SGD().init(x), lr=1.0)
    assert moved["w"].tolist() == [1.75, 2.0]
    assert state == {}


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(RecipeError, match=r"server\.momentum must be from 0 to below 1"):
        SGD(momentum=momentum)


class TestWithMomentum(ServerOptimizerPromises):
    make = staticmethod(lambda: SGD(momentum=0.9))
