"""SCAFFOLD and FedDyn in whole rounds: against plain torch; and what becomes of variates that do not count."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.plan import Plan
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.datasets.mnist import example as digits
from fedtower.recsys.standalone import Standalone
from fedtower.recsys.tasks import make_task
from fedtower.recsys.training import Federated, Setting

REGISTRY = discover()
SMALL = [
    *("data.clients=6", "data.partition=shards", "data.validation_images=30", "model.hidden=[8]"),
    *("local.epochs=1", "local.batch_size=12", "local.lr=0.1", "local.control=scaffold", "cohort.size=3"),
]


def setting_of(folder: Path, *overrides: str) -> Setting:
    data = digits.write(folder)
    given = [f"data.path={data['path']!r}", *SMALL, *overrides]
    recipe = load_recipe("fedsgd-mnist-mlp", given, REGISTRY)
    draws = Draws(recipe.seed)
    images = REGISTRY.make("dataset", recipe.data.part).load(draws=draws, progress=lambda message: None)
    return Setting(recipe, REGISTRY, make_task(images, recipe, draws), Hooks.none(), draws, time.monotonic)


class Cohorts:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def round_started(self, round: int, cohort: Any) -> None:
        self.seen.append(cohort.clients)


def gradients(x: dict[str, torch.Tensor], images: Any, labels: Any) -> dict[str, torch.Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    w = list(leaves.values())
    hidden = torch.relu(functional.linear(torch.from_numpy(images).flatten(1), w[0], w[1]))
    loss = functional.cross_entropy(functional.linear(hidden, w[2], w[3]), torch.from_numpy(labels).long())
    return dict(zip(leaves, torch.autograd.grad(loss, w), strict=True))


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_it_is_the_algorithm_in_plain_torch(tmp_path: Path, weights: str) -> None:
    setting, cohorts = setting_of(tmp_path, f"aggregator.weights={weights}"), Cohorts()
    setting.hooks.add(cohorts, "cohorts")
    training = Federated(setting)
    first = training.learned().parameters
    names = [name for name in first if not name.startswith("control.")]
    x = {name: torch.tensor(first[name]) for name in names}
    c = {name: torch.zeros_like(x[name]) for name in names}
    own = [{name: torch.zeros_like(x[name]) for name in names} for _ in range(6)]
    lr = setting.recipe.local.lr
    for round, report in zip(range(1, 6), training.rounds(), strict=False):
        clients = cohorts.seen[-1]
        work = setting.task.client_data().work(Plan(round, {}, setting.recipe.local), clients)
        shares = work.examples / work.examples.sum() if weights == "examples" else np.full(3, 1 / 3)
        further, changed = (
            {name: 0 * value for name, value in x.items()},
            {name: 0 * value for name, value in x.items()},
        )
        for at, client in enumerate(clients.tolist()):
            y = dict(x)
            for step in range(int(work.steps[at])):
                real = work.inputs["weight"][at, step] > 0
                slopes = gradients(
                    y, np.array(work.inputs["dense"][at, step])[real], work.inputs["label"][at, step][real]
                )
                y = {name: y[name] - lr * (slopes[name] - own[client][name] + c[name]) for name in names}
            new = {
                name: own[client][name] - c[name] + (x[name] - y[name]) / (int(work.steps[at]) * lr) for name in names
            }
            for name in names:
                further[name] += float(shares[at]) * (y[name] - x[name])
                changed[name] += float(shares[at]) * (new[name] - own[client][name])
            own[client] = new
        x = {name: x[name] + further[name] for name in names}
        c = {name: c[name] + 3 / 6 * changed[name] for name in names}
        assert report.metrics["steps"] > 1
        now = training.learned()
        for name in names:
            np.testing.assert_allclose(now.parameters[name], x[name], rtol=1e-3, atol=2e-6, err_msg=name)
            np.testing.assert_allclose(now.parameters[f"control.{name}"], c[name], rtol=1e-3, atol=2e-5, err_msg=name)
            kept = now.store.read(f"own_control.{name}", np.arange(6))
            wanted = torch.stack([each[name] for each in own])
            np.testing.assert_allclose(kept, wanted, rtol=1e-3, atol=5e-5, err_msg=name)
    assert all(float(value.abs().max()) > 1e-3 for value in c.values())


def test_feddyn_is_the_algorithm_in_plain_torch(tmp_path: Path) -> None:
    alpha, lr = 0.2, 0.1
    dyn = [f"local.proximal={alpha}", "local.control=feddyn", "server.optimizer=feddyn", "aggregator.weights=equal"]
    setting, cohorts = setting_of(tmp_path, *dyn), Cohorts()
    setting.hooks.add(cohorts, "cohorts")
    training = Federated(setting)
    first = training.learned().parameters
    names = list(first)
    assert not [name for name in names if name.startswith("control.")], "nothing more travels"
    x = {name: torch.tensor(first[name]) for name in names}
    h = {name: torch.zeros_like(x[name]) for name in names}
    own = [{name: torch.zeros_like(x[name]) for name in names} for _ in range(6)]
    for round, _ in zip(range(1, 6), training.rounds(), strict=False):
        work = setting.task.client_data().work(Plan(round, {}, setting.recipe.local), cohorts.seen[-1])
        ends = []
        for at, client in enumerate(cohorts.seen[-1].tolist()):
            y = dict(x)
            for step in range(int(work.steps[at])):
                real = work.inputs["weight"][at, step] > 0
                slopes = gradients(
                    y, np.array(work.inputs["dense"][at, step])[real], work.inputs["label"][at, step][real]
                )
                y = {
                    name: y[name] - lr * (slopes[name] - own[client][name] + alpha * (y[name] - x[name]))
                    for name in names
                }
            own[client] = {name: own[client][name] - alpha * (y[name] - x[name]) for name in names}
            ends.append(y)
        h = {name: h[name] - alpha / 6 * sum(y[name] - x[name] for y in ends) for name in names}
        x = {name: torch.stack([y[name] for y in ends]).mean(dim=0) - h[name] / alpha for name in names}
        for name in names:
            np.testing.assert_allclose(training.learned().parameters[name], x[name], rtol=1e-3, atol=5e-6, err_msg=name)
    assert all(float(value.abs().max()) > 1e-3 for value in h.values())


def test_a_run_goes_on_from_a_snapshot_with_the_same_bits(tmp_path: Path) -> None:
    whole, halves = Federated(setting_of(tmp_path)), Federated(setting_of(tmp_path))
    for _ in zip(range(4), whole.rounds(), strict=False):
        pass
    for _ in zip(range(2), halves.rounds(), strict=False):
        pass
    later = Federated(setting_of(tmp_path))
    kept = {f"clients/{name}": value for name, value in halves.learned().store.snapshot().items()}
    later.restore({**halves.snapshot(), **kept})
    for _ in zip(range(2), later.rounds(), strict=False):
        pass
    assert_same_bits(later.snapshot(), whole.snapshot())
    assert_same_bits(dict(later.learned().store.snapshot()), dict(whole.learned().store.snapshot()))


def test_who_is_refused_keeps_its_variates(tmp_path: Path) -> None:
    class Nobody(Cohorts):
        @hookimpl
        def accept_update(self, update: Any) -> str | None:
            return None if int(update.clients[0]) == int(self.seen[-1][0]) else "not today"

    setting, nobody = setting_of(tmp_path), Nobody()
    setting.hooks.add(nobody, "nobody")
    training = Federated(setting)
    next(training.rounds())
    written = training.learned().store.snapshot()["own_control.out.weight.clients"]
    assert written.tolist() == [int(nobody.seen[0][0])]


def test_the_server_s_optimiser_has_the_trained_parameters_alone(tmp_path: Path) -> None:
    training = Federated(setting_of(tmp_path, "server.optimizer=adam", "server.lr=0.01"))
    next(training.rounds())
    held = training.snapshot()
    assert {name for name in held if name.startswith("optimizer/m/")} == {
        f"optimizer/m/{name}" for name in ("hidden.0.weight", "hidden.0.bias", "out.weight", "out.bias")
    }
    assert np.abs(held["parameters/control.out.weight"]).max() > 0


@pytest.mark.parametrize("half", [["local.control=feddyn", "local.proximal=0.1"], ["server.optimizer=feddyn"]])
def test_feddyn_is_not_had_by_halves(tmp_path: Path, half: list[str]) -> None:
    with pytest.raises(RecipeError, match="FedDyn has two halves"):
        Federated(setting_of(tmp_path, *half))


def test_fednova_has_no_rule_for_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'fednova' divides .* local\.control = 'scaffold' it cannot tell"):
        Federated(setting_of(tmp_path, "aggregator.name=fednova"))


def test_rounds_that_wait_for_nobody_are_refused() -> None:
    late = ["transport.name=virtual_clock", "asynchronous.buffer=2", "asynchronous.concurrency=3"]
    for control in ("local.control=scaffold", "local.control=feddyn"):
        more = ["local.proximal=0.1", "server.optimizer=feddyn"] if control.endswith("feddyn") else []
        with pytest.raises(RecipeError, match="discounts what comes late while the client keeps the whole of it"):
            load_recipe("fedsgd-mnist-mlp", [*SMALL, *late, *more, control], REGISTRY)
    assert load_recipe("fedsgd-mnist-mlp", [*SMALL, *late, "local.control=none"], REGISTRY).asynchronous


def test_centrally_there_is_no_drift(tmp_path: Path) -> None:
    setting = setting_of(tmp_path, "mode=standalone", "standalone.epochs=1")
    assert not [name for name in Standalone(setting).learned().parameters if "control" in name]
