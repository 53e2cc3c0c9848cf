"""Standalone training: autograd on the obvious model, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fedtower
from fedtower.core.errors import RecipeError
from fedtower.core.plan import Plan
from fedtower.recsys.models import SequenceTower
from fedtower.recsys.run import Run
from fedtower.recsys.standalone import Standalone
from fedtower.recsys.testing.states import everything
from fedtower.recsys.training import Setting, assemble

SettingOf = Callable[..., Setting]

# One step over everybody, and tables by plain gradient descent: what moves is minus the gradient.
ONE_STEP = {
    "mode": "standalone",
    "standalone.users_per_batch": 60,
    "standalone.epochs": 1,
    "standalone.row_lr": 1.0,
    "rows.optimizer": "sgd",
    "local.lr": 2.0,
}


def slow_loss(setting: Setting, item: Tensor, bias: Tensor, own: Tensor) -> Tensor:
    """The mean loss over the examples of epoch 1, example by example, from whole tables and users' vectors."""
    model = assemble(setting)
    tower, local = model.declared.shared, setting.recipe.local
    assert isinstance(tower, SequenceTower)
    assert model.tables is not None
    given = replace(local, steps=1, epochs=None, negatives=max(local.negatives, 1))
    if local.loss == "in_batch_softmax":
        given = replace(given, negatives=1)
    work = setting.task.client_data().work(Plan(1, {}, given), np.arange(60))
    everything = torch.from_numpy(setting.task.features(np.arange(200)))
    catalogue = model.tables.tower(torch.cat([item, bias], dim=1), everything)
    vectors, chosen, negatives = [], [], []
    for client in range(60):
        ids = work.row_ids["item"].of(client)
        history, drawn = ids[work.slots["history"][client, 0]], ids[work.slots["negatives"][client, 0]]
        user = torch.from_numpy(np.array(work.inputs["user"][client, 0]))
        for slot, weight in zip(work.inputs["target"][client, 0], work.inputs["weight"][client, 0], strict=True):
            if weight:
                seen = catalogue[torch.from_numpy(history[:slot])]
                vectors.append(tower.represent(seen, torch.tensor([int(slot)]), user)[0] + own[client])
                chosen.append(int(history[slot]))
                negatives.append(drawn)
    users = torch.stack(vectors)
    if local.loss == "in_batch_softmax":
        scores = tower.score(users, catalogue[chosen])
        for place, mine in enumerate(chosen):
            for column, other in enumerate(chosen):
                if mine == other and place != column:
                    scores[place, column] = -torch.inf
        return functional.cross_entropy(scores, torch.arange(len(chosen)))
    losses = []
    for place, vector in enumerate(users):
        rows = catalogue[[chosen[place], *negatives[place].tolist()]]
        scores = tower.score(vector[None], rows)[0]
        if local.loss == "bce":
            losses.append(functional.softplus(-scores[0]) + functional.softplus(scores[1:]).mean())
        else:
            losses.append(functional.cross_entropy(scores[None], torch.tensor([0])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce", "in_batch_softmax"])
def test_one_step_is_autograd_on_the_obvious_model(setting_of: SettingOf, loss: str) -> None:
    setting = setting_of({**ONE_STEP, "local.loss": loss, "local.batch_size": 6, "local.history_length": 5})
    training = Standalone(setting)
    before = {name: np.array(value) for name, value in everything(training).items()}
    (report,) = list(training.rounds())
    after = everything(training)

    item, bias = (torch.from_numpy(before[f"tables/table/{name}"]).requires_grad_() for name in ("item", "item_bias"))
    own = torch.zeros(60, 8, requires_grad=True)
    expected = slow_loss(setting, item, bias, own)
    slopes = torch.autograd.grad(expected, [item, bias, own])
    assert report.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, slope in zip(("item", "item_bias"), slopes, strict=False):
        moved = after[f"tables/table/{name}"] - before[f"tables/table/{name}"]
        np.testing.assert_allclose(moved, -slope.numpy(), atol=2e-6)
    # A user's own vector is stepped as on her device: by the mean over her own examples, were she one of 60 alike.
    np.testing.assert_allclose(after["clients/user_vector.values"], -2.0 * 60 * slopes[2].numpy(), atol=1e-5)
    assert all(not np.array_equal(after[name], before[name]) for name in before if name.startswith("parameters/"))


def test_epochs_lower_the_loss(setting_of: SettingOf) -> None:
    losses = [report.loss for report in Standalone(setting_of({"standalone.epochs": 6})).rounds()]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    assert losses[1] < losses[0]


def test_in_batch_softmax_learns_where_a_batch_holds_many_users(setting_of: SettingOf) -> None:
    setting = setting_of({"mode": "standalone", "standalone.epochs": 8, "local.loss": "in_batch_softmax"})
    losses = [report.loss for report in Standalone(setting).rounds()]
    assert losses[-1] < 0.95 * losses[0]
    assert losses[1] < losses[0]


def test_in_batch_softmax_of_one_user_a_batch_is_refused(setting_of: SettingOf) -> None:
    setting = setting_of({"local.loss": "in_batch_softmax", "standalone.users_per_batch": 1, "mode": "standalone"})
    with pytest.raises(RecipeError, match=r"needs standalone\.users_per_batch of at least 2: others' items"):
        Standalone(setting)


def test_a_loss_of_other_data_is_refused_before_the_first_epoch(setting_of: SettingOf) -> None:
    with pytest.raises(RecipeError, match="'cross_entropy' is not for this model and data; there are sampled_softmax"):
        Standalone(setting_of({"mode": "standalone", "local.loss": "cross_entropy"}))


def test_in_batch_softmax_is_refused_in_simulated_mode_before_anything_is_made(run_root: Any) -> None:
    with pytest.raises(RecipeError, match=r"single users.*its own positives.*mode = 'standalone'"):
        fedtower.run("dssm-synthetic", {"local.loss": "in_batch_softmax"})
    assert not list(run_root.iterdir())


def test_every_user_takes_part_in_an_epoch_and_nothing_is_sent(setting_of: SettingOf) -> None:
    training = Standalone(setting_of({"standalone.users_per_batch": 7}))
    report = next(training.rounds())
    assert (report.clients, report.dropped, report.bytes_up, report.bytes_down) == (60, 0, 0, 0)
    assert everything(training)["clients/user_vector.clients"].tolist() == list(range(60))


def test_epochs_visit_users_in_another_order(setting_of: SettingOf) -> None:
    setting = setting_of()
    orders = [setting.draws.permutation(60, "epoch", epoch).tolist() for epoch in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(60))
    assert orders[0] != orders[1]


def test_learning_rates_fall_to_the_last_epoch(setting_of: SettingOf) -> None:
    # With the last epoch's share at nothing, the last epoch moves nothing.
    training = Standalone(setting_of({"standalone.epochs": 3, "standalone.decay_to": 0.0}))
    snapshots = []
    for _ in training.rounds():
        snapshots.append({name: np.array(value) for name, value in everything(training).items()})
    learnt = ("parameters/", "tables/table/", "tables/tower/", "clients/user_vector.values")
    for name in (name for name in snapshots[0] if name.startswith(learnt)):
        moved = [not np.array_equal(one[name], other[name]) for one, other in pairwise(snapshots)]
        assert moved == [True, False], name


def test_the_mode_is_one_word(federated_run: Run, standalone_run: Run) -> None:
    recipes = [run.trained.setting.recipe for run in (federated_run, standalone_run)]
    assert replace(recipes[1], mode="simulated") == recipes[0]
    figures: list[Mapping[str, float]] = [run.metrics for run in (federated_run, standalone_run)]
    assert list(figures[0]) == list(figures[1])
    baselines = [[event["metrics"] for event in run.summary["baselines"]] for run in (federated_run, standalone_run)]
    assert baselines[0] == baselines[1]
