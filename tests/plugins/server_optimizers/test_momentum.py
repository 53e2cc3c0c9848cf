"""FedAvgM: by hand, and torch's own as an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.testing.server_optimizer import ServerOptimizerPromises
from fedtower.plugins.server_optimizers.sgd import SGD, FedAvgM


def deltas(round: int) -> dict[str, np.ndarray]:
    draws = Draws(5)
    return {
        "w": draws.normal("w", round, np.arange(6)).reshape(2, 3).astype(np.float32),
        "scale": draws.normal("scale", round).astype(np.float32),
    }


@pytest.mark.parametrize("nesterov", [False, True])
def test_it_steps_as_torch_does(nesterov: bool) -> None:
    ours = deltas(0)
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in ours.items()}
    oracle = torch.optim.SGD(list(theirs.values()), lr=0.1, momentum=0.8, nesterov=nesterov)
    optimizer, parameters = FedAvgM(momentum=0.8, nesterov=nesterov), dict(ours)
    state = optimizer.init(parameters)
    for round in range(1, 12):
        moved, state = optimizer.update(parameters, deltas(round), state, lr=0.1 / round)
        parameters = dict(moved)
        oracle.param_groups[0]["lr"] = 0.1 / round
        for name, delta in deltas(round).items():
            theirs[name].grad = -torch.tensor(delta)
        oracle.step()
    for name, value in parameters.items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("nesterov", "wanted"), [(False, [1.0, 2.5]), (True, [1.5, 3.25])])
def test_two_steps_by_hand(nesterov: bool, wanted: list[float]) -> None:
    # v is 1 and then 1.5; looking ahead the steps are 1 + 0.5 and 1 + 0.75.
    optimizer, x = FedAvgM(momentum=0.5, nesterov=nesterov), {"w": np.zeros(1, dtype=np.float32)}
    one, state = optimizer.update(x, {"w": np.ones(1, dtype=np.float32)}, optimizer.init(x), lr=1.0)
    two, _ = optimizer.update(one, {"w": np.ones(1, dtype=np.float32)}, state, lr=1.0)
    assert [float(one["w"][0]), float(two["w"][0])] == wanted


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(RecipeError, match=r"server\.momentum must be from 0 to below 1"):
        FedAvgM(momentum=momentum)


def test_it_is_sgd_under_another_name() -> None:
    assert FedAvgM() == FedAvgM(momentum=0.9)
    x, optimizers = deltas(0), (SGD(momentum=0.9, nesterov=True), FedAvgM(nesterov=True))
    one, other = (each.update(x, deltas(1), each.init(x), lr=0.5) for each in optimizers)
    assert_same_bits(one, other)


def test_without_momentum_there_is_nowhere_to_look_ahead_to() -> None:
    with pytest.raises(RecipeError, match=r"set server\.momentum, such as 0\.9"):
        SGD(nesterov=True)


class TestLookingAhead(ServerOptimizerPromises):
    make = staticmethod(lambda: FedAvgM(nesterov=True))
