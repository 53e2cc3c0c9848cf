"""Control variates: by hand, and the drift that they take away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtower.core.control import corrected, moved, without_variates
from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.updates import Updates
from fedtower.plugins.server_optimizers.feddyn import FedDyn


def numbers(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def plan(x: float, control: float, lr: float = 0.5) -> Plan:
    parameters = {"x": numbers(x)[0:1], "control.x": numbers(control)[0:1]}
    return Plan(1, parameters, LocalSettings(epochs=1, lr=lr, control="scaffold"))


def test_three_clients_by_hand() -> None:
    # c is 4 and the clients' own are 1, 2, 3. Two steps of 1/2 went -3: a mean gradient of 3. One went +1: of -2.
    block = Updates(
        np.array([1.0, 5.0, 0.0]),
        {"x": numbers(-3, 1, 0)[:, None], "control.x": np.zeros((3, 1), np.float32)},
        metrics={"steps": np.array([2.0, 1.0, 0.0])},
    )
    own = {"own_control.x": numbers(1, 2, 3)[:, None]}
    updates, kept = corrected(plan(7, 4), own, block, {**own, "vector": numbers(8, 8, 8)})
    # g - own + control is what was descended along, so the gradients were 3 + 1 - 4 = 0 and -2 + 2 - 4 = -4.
    assert kept["own_control.x"][:, 0].tolist() == [0, -4, 3]
    assert kept["vector"].tolist() == [8, 8, 8]
    assert updates.dense["control.x"][:, 0].tolist() == [-1, -6, 0]
    assert updates.dense["x"][:, 0].tolist() == [-3, 1, 0]


def test_the_server_s_variate_goes_as_far_as_the_share_that_counted() -> None:
    after = moved(plan(7, 4).parameters, {"x": numbers(100), "control.x": numbers(-6)}, share=0.25)
    assert {name: value.tolist() for name, value in after.items()} == {"control.x": [2.5]}
    assert set(without_variates(plan(7, 4).parameters)) == {"x"}


def descend(x: float, slope: float, goal: float, steps: int, lr: float, drift: float) -> float:
    for _ in range(steps):
        x -= lr * (slope * (x - goal) + drift)
    return x


@pytest.mark.parametrize(("control", "wanted"), [(True, 4 / 5), (False, None)])
def test_clients_with_other_goals_meet_at_the_least_mean_loss(control: bool, wanted: float | None) -> None:
    # Losses (x - 4)^2 / 2 and 4 (x - 0)^2 / 2: their mean is least at 4/5. Ten local steps drift from there.
    slopes, goals = (1.0, 4.0), (4.0, 0.0)
    x, c, own = 0.0, 0.0, {"own_control.x": np.zeros((2, 1), np.float32)}
    for _ in range(200):
        now = plan(x, c if control else 0.0, lr=0.1)
        drifts = [float(now.parameters["control.x"][0] - each[0]) for each in own["own_control.x"]]
        deltas = [
            descend(x, slope, goal, 10, 0.1, drift) - x
            for slope, goal, drift in zip(slopes, goals, drifts, strict=True)
        ]
        block = Updates(np.ones(2), {"x": numbers(*deltas)[:, None]}, metrics={"steps": np.full(2, 10.0)})
        updates, kept = corrected(now, own, block, {})
        x += float(np.mean(deltas))
        if control:
            own = {"own_control.x": kept["own_control.x"]}
            c += float(updates.dense["control.x"].mean())
    if wanted is None:
        assert abs(x - 4 / 5) > 0.3, "or there was no drift to correct"
    else:
        assert x == pytest.approx(wanted, abs=1e-4)


def test_feddyn_keeps_the_gradient_at_which_a_visit_ended() -> None:
    now = replace(
        plan(7, 4), parameters={"x": numbers(7)}, local=LocalSettings(epochs=1, control="feddyn", proximal=0.5)
    )
    block = Updates(np.ones(2), {"x": numbers(-3, 0)[:, None]}, metrics={"steps": np.array([9.0, 0.0])})
    own = {"own_control.x": numbers(1, 2)[:, None], "vector": numbers(8, 8)}
    updates, kept = corrected(now, own, block, {"own_control.x": numbers(0, 0)[:, None], "vector": numbers(9, 9)})
    assert kept["own_control.x"][:, 0].tolist() == [1 + 0.5 * 3, 2]
    assert kept["vector"].tolist() == [9, 9], "what was trained stays as it was trained"
    assert updates is block


def test_feddyn_meets_at_the_least_mean_loss_too() -> None:
    # The losses of above, each visit to the very minimum of its own: of the loss, less own x, and the pull.
    alpha, x = 2.0, {"x": numbers(0)}
    slopes, goals, own = numbers(1, 4), numbers(4, 0), {"own_control.x": np.zeros((2, 1), np.float32)}
    server, local = FedDyn(), LocalSettings(epochs=1, control="feddyn", proximal=alpha)
    state = server.init(x)
    for round in range(200):
        ends = (slopes * goals + own["own_control.x"][:, 0] + alpha * x["x"]) / (slopes + alpha)
        there = np.array([[True, True], [True, False], [False, True]][round % 3])
        block = Updates(np.ones(2), {"x": np.where(there, ends - x["x"], 0)[:, None].astype(np.float32)})
        _, own = corrected(Plan(1, x, local), own, block, {})
        delta = {"x": block.dense["x"][there].mean(axis=0)}
        moved_to, state = server.counted(float(there.mean())).update(x, delta, state, 1.0)
        x = dict(moved_to)
    assert float(x["x"][0]) == pytest.approx(4 / 5, abs=1e-3)


def test_feddyn_needs_its_alpha() -> None:
    with pytest.raises(RecipeError, match=r"'feddyn' pulls back to where the visit started"):
        LocalSettings(epochs=1, control="feddyn")


@pytest.mark.parametrize("settings", [{"optimizer": "adam"}, {"optimizer": "momentum"}, {"proximal": 0.1}, {"lr": 0.0}])
def test_steps_that_are_no_plain_descent_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(
        RecipeError, match=r"local\.control = 'scaffold' tells a mean gradient from how far plain descent went"
    ):
        LocalSettings(**{"epochs": 1, "control": "scaffold", **settings})


def test_a_pull_pushes_nobody_away() -> None:
    with pytest.raises(RecipeError, match=r"local\.proximal must be at least 0"):
        LocalSettings(epochs=1, proximal=-0.1)
