"""FedNova: by hand, what steps add up to against steps that are taken, and the fixed point that it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.aggregators.fednova import FedNova, reach_of
from fedtower.recsys.local_optimizers import make_optimizer


def local(**settings: Any) -> LocalSettings:
    return LocalSettings(**{"epochs": 1, "optimizer": "sgd", "lr": 0.1, **settings})


def block(weights: list[float], deltas: list[float], steps: list[float]) -> Updates:
    clients = np.arange(len(weights))
    dense = {"w": np.array(deltas, dtype=np.float32)[:, None]}
    return Updates(np.array(weights), dense, clients=clients, metrics={"steps": np.array(steps)})


def test_two_clients_by_hand() -> None:
    # Shares 1/4 and 3/4; 2 and 10 steps; 8 effective ones; 6 and 2 a step.
    total, _ = FedNova().fold(iter([block([1, 3], [12, 20], [2, 10])]), {})
    assert total.dense["w"].tolist() == [[8 * (6 / 4 + 3 * 2 / 4)]]
    assert total.weights.tolist() == [4]


def test_rows_go_by_plain_steps() -> None:
    rows = Rows(np.array([0, 1, 3]), np.array([5, 5, 8]), np.array([[4], [6], [9]], dtype=np.float32))
    both = Updates(np.ones(2), rows={"item": rows}, metrics={"steps": np.array([1.0, 3.0])})
    total, _ = FedNova().instructed(Plan(1, {}, local(optimizer="momentum"))).fold(iter([both]), {})
    assert total.rows["item"].row_deltas.tolist() == [[2 * (4 + 2) / 2], [2 * 3]]


def test_as_many_steps_for_everybody_is_federated_averaging() -> None:
    same = block([1, 3, 2], [12, 20, -7], [4, 4, 4])
    nova, plain = (aggregator.fold(iter([same]), {})[0] for aggregator in (FedNova(), FedAvg()))
    np.testing.assert_allclose(nova.dense["w"], plain.dense["w"], rtol=1e-6)


def test_the_fixed_point_is_that_of_the_mean_loss() -> None:
    # Clients pull to 0 and to 10, the second with ten times as many steps: their mean loss is least at 5, where
    # federated averaging does not stay.
    def moved(x: float, aggregator: Any) -> float:
        steps = np.array([1, 10])
        deltas = [sum(0.001 * (goal - x) for _ in range(count)) for goal, count in zip((0, 10), steps, strict=True)]
        return float(aggregator.fold(iter([block([1, 1], deltas, steps.tolist())]), {})[0].dense["w"][0, 0])

    assert abs(moved(5.0, FedNova())) < 1e-6
    assert moved(5.0, FedAvg()) > 0.01


@pytest.mark.parametrize("settings", [{}, {"proximal": 2.0}, {"optimizer": "momentum", "momentum": 0.8}])
def test_what_steps_add_up_to_is_what_they_go(settings: dict[str, Any]) -> None:
    of = local(**settings)
    optimizer, x = make_optimizer(of), {"w": torch.zeros(1)}
    state, gone = optimizer.init(x), []
    for _ in range(7):
        gradient = -torch.ones(1) + of.proximal * x["w"]
        x, state = optimizer.update(x, {"w": gradient}, state, of.lr)
        gone.append(float(x["w"]) / of.lr)
    np.testing.assert_allclose(reach_of(of)(np.arange(1.0, 8.0)), gone, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "adam"}, {"optimizer": "adagrad"}, {"optimizer": "momentum", "proximal": 0.1}, {"proximal": 20.0}],
)
def test_steps_that_add_up_to_nothing_known_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="aggregator 'fednova' divides an update by what its steps add up to"):
        FedNova().instructed(Plan(1, {}, local(**settings)))


def test_who_does_not_say_has_no_weight() -> None:
    honest = block([1, 3], [12, 20], [2, 10])
    silent = Updates(np.ones(1), {"w": np.array([[900]], dtype=np.float32)}, clients=np.array([7]))
    liars = block([5, 5, 5], [900, 900, 900], [0, np.nan, np.inf])
    total, _ = FedNova().fold(iter([silent, honest, liars]), {})
    assert total.dense["w"].tolist() == [[24]]
    with pytest.raises(UpdateError, match="no update with weight says how many steps it took"):
        FedNova().fold(iter([silent]), {})
