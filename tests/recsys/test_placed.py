"""FedPer and FedRep in whole rounds: what stays on devices, what moves when, and what cannot be placed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.runtime import Work
from fedtower.plugins.datasets.criteo import example as clicks
from fedtower.plugins.datasets.mnist import example as digits
from fedtower.recsys.models import Declared, ExampleTower, Schema
from fedtower.recsys.own_model import own_view
from fedtower.recsys.phases import HEAD, phased
from fedtower.recsys.placed import placed
from fedtower.recsys.scorer import ModelScorer
from fedtower.recsys.step import pure
from fedtower.recsys.tasks import Histories, Labelled, make_task
from fedtower.recsys.testing.examples import CLICKS, SCHEMA, MeanUser, cases
from fedtower.recsys.testing.states import everything
from fedtower.recsys.training import Federated, Setting

SettingOf = Callable[..., Setting]
REGISTRY = discover()
PLAIN = {"model.user_vector": False, "transforms": [], "transport.dropout": 0.0}
HEADED = {**PLAIN, "local.on_device": ["second"]}
HEAD_NAMES = ("second.weight", "second.bias")


def rounds_of(training: Federated, count: int) -> Federated:
    for _ in zip(range(count), training.rounds(), strict=False):
        pass
    return training


def updates_of(training: Federated, clients: list[int]) -> tuple[Any, dict[str, Any], Work, Plan]:
    """One visit, with nothing settled: the updates, what the devices would keep, and what was trained on."""
    parts = training._parts
    plan = Plan(1, training._state.parameters, parts.local)
    who = np.array(clients)
    work = parts.client.given(plan, who)
    updates = parts.client.visit(plan, who)
    states = dict(parts.client.staged[-1].states)
    parts.client.discard()
    return updates, states, work, plan


def test_a_tower_on_the_device_is_in_no_update_and_no_plan(setting_of: SettingOf) -> None:
    training = Federated(setting_of(HEADED))
    assert not set(HEAD_NAMES) & set(training.learned().parameters)
    updates, states, work, _ = updates_of(training, [0, 3, 9])
    assert sorted(updates.dense) == ["first.bias", "first.weight", "mixture"]
    assert sorted(states) == sorted(HEAD_NAMES)
    for name in HEAD_NAMES:
        assert np.all(np.any((states[name] != work.states[name]).reshape(3, -1), axis=1)), "each trained its own"


def test_every_client_keeps_the_head_that_it_trained_and_is_judged_by_it(setting_of: SettingOf) -> None:
    training = rounds_of(Federated(setting_of(HEADED)), 3)
    learned, task = training.learned(), training._setting.task
    assert isinstance(task, Histories)
    seen = training._model.store.read("second.bias", np.arange(60))
    assert len(np.unique(seen, axis=0)) > 20, "as many heads as clients that took part, and the first one"
    scorer = task.scorer(learned, "test")
    assert isinstance(scorer, ModelScorer)
    clients = np.array([2, 11, 40])
    cut = task.population.events(clients).lengths - 1
    scores = scorer.score_all(clients, cut)
    for case, client in enumerate(clients.tolist()):
        own = {name: torch.from_numpy(value[0]) for name, value in _own(training, client).items()}
        alone = replace(
            learned,
            declared=replace(learned.declared, on_device=()),
            parameters={**learned.parameters, **{name: value.numpy() for name, value in own.items()}},
        )
        expected = task.scorer(alone, "test").score_all(clients[case : case + 1], cut[case : case + 1])
        np.testing.assert_allclose(scores[case], expected[0], rtol=1e-4, atol=1e-5)


def _own(training: Federated, client: int) -> dict[str, Any]:
    return {name: training._model.store.read(name, np.array([client])) for name in HEAD_NAMES}


def test_all_of_a_visit_s_first_part_is_the_head_s_and_the_rest_is_not(setting_of: SettingOf) -> None:
    """FedRep, step by step, against plain torch: the head under the representation that was sent, then the rest."""
    setting = setting_of({**HEADED, "local.lr": 0.5})
    local = replace(setting.recipe.local, steps=None, epochs=3, head_first=2)
    training = Federated(replace(setting, recipe=replace(setting.recipe, local=local)))
    updates, states, work, plan = updates_of(training, [5])
    head = work.inputs[HEAD][0]
    assert head.tolist() == [1.0] * (2 * len(head) // 3) + [0.0] * (len(head) // 3), "two epochs of three"
    tower = training._model.declared.shared
    leaves = {name: torch.tensor(value).requires_grad_() for name, value in plan.parameters.items()}
    leaves |= {name: torch.tensor(work.states[name][0]).requires_grad_() for name in HEAD_NAMES}
    rows = torch.tensor(work.rows["item"])
    for step in range(int(work.steps[0])):
        table = rows.clone().requires_grad_()
        slots = {name: table[torch.tensor(where[0, step])] for name, where in work.slots.items()}
        inputs = {name: torch.tensor(np.array(value[0, step])) for name, value in work.inputs.items()}
        losses: Tensor = torch.func.functional_call(
            _Losses(tower), {f"tower.{n}": v for n, v in leaves.items()}, (slots, inputs)
        )
        loss = (losses * inputs["weight"]).sum() / inputs["weight"].sum()
        slopes = dict(zip([*leaves, "rows"], torch.autograd.grad(loss, [*leaves.values(), table]), strict=True))
        for name, leaf in leaves.items():
            if (name in HEAD_NAMES) == bool(head[step]):
                leaf.data -= 0.5 * slopes[name]
        if not head[step]:
            rows = rows - 0.5 * slopes["rows"]
    for name, leaf in leaves.items():
        got = states[name][0] if name in HEAD_NAMES else updates.dense[name][0] + plan.parameters[name]
        np.testing.assert_allclose(got, leaf.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(updates.rows["item"].row_deltas + work.rows["item"], rows.numpy(), rtol=1e-4, atol=1e-5)


class _Losses(nn.Module):
    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, slots: Any, inputs: Any) -> Tensor:
        losses: Tensor = self.tower.losses(slots, inputs, "sampled_softmax")
        return losses


def test_with_epochs_for_the_head_the_rest_learns_something_else(setting_of: SettingOf) -> None:
    fedper = rounds_of(Federated(setting_of(HEADED, epochs=2)), 2)
    setting = setting_of(HEADED, epochs=2)
    local = replace(setting.recipe.local, head_first=1)
    other = rounds_of(Federated(replace(setting, recipe=replace(setting.recipe, local=local))), 2)
    assert not np.array_equal(other.learned().parameters["first.weight"], fedper.learned().parameters["first.weight"])


def test_a_tower_on_the_device_trains_alike_in_both_runtimes(setting_of: SettingOf) -> None:
    given = {**HEADED, "local.steps": 3, "local.head_first": 1}
    slow, fast = (
        rounds_of(Federated(setting_of({**given, "runtime.name": name})), 2) for name in ("torch_loop", "vectorized")
    )
    for name, value in everything(slow).items():
        np.testing.assert_allclose(everything(fast)[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("steps", "first"), [(4, [1, 1, 0, 0]), (3, [1, 1, 0]), (2, [1, 0]), (1, [0]), (0, [])])
def test_a_short_visit_is_divided_in_proportion(steps: int, first: list[int]) -> None:
    weight = np.ones((1, max(steps, 1), 2), dtype=np.float32)
    work = Work(np.array([0]), np.array([steps]), np.array([2 * steps]), {"weight": weight})
    head = phased(work, LocalSettings(steps=4, head_first=2)).inputs[HEAD]
    assert head[0, :steps].tolist() == first
    assert HEAD not in phased(work, LocalSettings(steps=4)).inputs


class Scaled(MeanUser):
    """Scores with a parameter that no user's vector holds."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(8, SCHEMA.num_user_features, generator)
        self.temperature = nn.Parameter(torch.ones(1))

    def score(self, vectors: Tensor, rows: Tensor) -> Tensor:
        return super().score(vectors, rows) * self.temperature


@pytest.mark.parametrize(
    ("model", "schema", "local", "told"),
    [
        ("histories", SCHEMA, {"on_device": ("histry",)}, "'histry', which the model does not have.*mean 'history'"),
        ("histories", SCHEMA, {"on_device": ("history",), "frozen": ("history.weight",)}, "both name history.weight"),
        ("images", CLICKS, {"on_device": ("maps", "out")}, "leaves nothing to share"),
        ("scaled", SCHEMA, {"on_device": ("temperature",)}, "temperature cannot live on devices: items are scored"),
    ],
)
def test_what_cannot_be_placed_is_refused_in_words(
    model: str, schema: Schema, local: dict[str, Any], told: str
) -> None:
    known: dict[str, Declared] = {name: case.model for name, case in cases().items()}
    scaled = replace(known["histories"], shared=Scaled(torch.Generator().manual_seed(1)))
    with pytest.raises(RecipeError, match=told):
        placed({**known, "scaled": scaled}[model], LocalSettings(steps=1, **local), schema)


def test_a_head_needs_something_on_the_device(setting_of: SettingOf) -> None:
    with pytest.raises(RecipeError, match=r"this model keeps nothing on devices: name some of its towers"):
        Federated(setting_of({**PLAIN, "local.steps": 2, "local.head_first": 1}))


@pytest.mark.parametrize("given", [{"steps": 2, "head_first": 2}, {"epochs": 1, "head_first": -1}])
def test_a_visit_of_the_head_alone_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="others learn from what comes after the head"):
        LocalSettings(**given)  # type: ignore[arg-type]


def test_control_variates_do_not_go_with_phases() -> None:
    with pytest.raises(RecipeError, match="reckons with all of them"):
        LocalSettings(steps=2, head_first=1, control="scaffold")


def digits_of(folder: Path, *more: str) -> Setting:
    given = [f"data.path={digits.write(folder)['path']!r}", "data.clients=6", "data.validation_images=30"]
    small = ["data.partition=shards", "model.hidden=[8]", "local.batch_size=12", "cohort.size=6", "local.lr=0.2"]
    recipe = load_recipe("fedavg-mnist-mlp", [*given, *small, "runtime.name=torch_loop", *more], REGISTRY)
    draws = Draws(recipe.seed)
    images = REGISTRY.make("dataset", recipe.data.part).load(draws=draws, progress=lambda message: None)
    return Setting(recipe, REGISTRY, make_task(images, recipe, draws), Hooks.none(), draws, time.monotonic)


@pytest.mark.parametrize("more", [["local.on_device=['out']"], ["local.ditto=0.1", "evaluation.personal=true"]])
def test_where_examples_are_nobody_s_a_client_is_judged_on_the_classes_that_it_has(
    tmp_path: Path, more: list[str]
) -> None:
    training = rounds_of(Federated(digits_of(tmp_path, *more)), 2)
    task, learned = training._setting.task, training.learned()
    assert isinstance(task, Labelled)
    found = task.judge(learned, "validation")
    held, figures = task.examples.held_out("validation"), []
    tower = learned.declared.shared
    assert isinstance(tower, ExampleTower)
    for client in range(6):
        own = {name: value[0] for name, value in learned.own(np.array([client])).items()}
        model = {**learned.shared(), **own_view(own)} if "personal.out.bias" in own else {**learned.shared(), **own}
        mine = task.examples.examples(np.array([client])).labels
        right: dict[int, list[bool]] = {}
        for label, image in zip(held.labels.tolist(), held.dense, strict=True):
            with torch.no_grad():
                logits = pure(tower, "logits")(model, {}, {"dense": torch.from_numpy(image[None])})
            right.setdefault(label, []).append(int(logits.argmax()) == label)
        known = [label for label in mine.tolist() if label in right]
        figures.append(np.mean([np.mean(right[label]) for label in known]))
    assert found.metrics["accuracy"] == pytest.approx(np.mean(figures))
    assert (found.protocol_label, found.users) == ("held-out examples of each client's classes", 6)


@pytest.mark.parametrize("mode", ["simulated", "deployed"])
def test_models_that_nobody_could_judge_are_refused(tmp_path: Path, mode: Any) -> None:
    given = [*(f"data.{name}={value!r}" for name, value in clicks.write(tmp_path).items()), "local.on_device=['wide']"]
    recipe = load_recipe("wide-deep-criteo", [each.replace("True", "true") for each in given], REGISTRY)
    recipe = replace(recipe, mode=mode)
    draws = Draws(recipe.seed)
    rows = REGISTRY.make("dataset", recipe.data.part).load(draws=draws, progress=lambda message: None)
    with pytest.raises(RecipeError, match=r"wide\.bias to itself, and .* holds examples out for all clients together"):
        Federated(Setting(recipe, REGISTRY, make_task(rows, recipe, draws), Hooks.none(), draws, time.monotonic))


@pytest.mark.parametrize("mode", ["simulated", "deployed"])
def test_what_is_tuned_before_it_is_judged_ranks_items(tmp_path: Path, mode: Any) -> None:
    setting = digits_of(tmp_path, "local.on_device=['out']", "evaluation.personal=true")
    with pytest.raises(RecipeError, match=r"needs held-out items of each client's own.* or local\.ditto"):
        Federated(replace(setting, recipe=replace(setting.recipe, mode=mode)))
