"""Ditto in whole rounds: its two ends, what it leaves alone, and whose model is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.ditto import with_copies
from fedtower.recsys.own_model import PERSONAL
from fedtower.recsys.personal import PersonalScorer
from fedtower.recsys.tasks import Histories
from fedtower.recsys.testing.examples import cases
from fedtower.recsys.training import Federated, Setting

SettingOf = Callable[..., Setting]
# Everybody takes part, rows are left alone, and a visit is two steps.
PLAIN = {
    "model.user_vector": False,
    "transforms": [],
    "transport.dropout": 0.0,
    "cohort.size": 60,
    "rows.train": "frozen",
    "local.steps": 2,
    "local.lr": 0.2,
}
EVERYBODY = np.arange(60)


def trained(setting: Setting, rounds: int) -> Federated:
    training = Federated(setting)
    for _ in zip(range(rounds), training.rounds(), strict=False):
        pass
    return training


def copies(training: Federated) -> dict[str, Any]:
    held = training._model
    return {
        name.removeprefix(PERSONAL): held.store.read(name, EVERYBODY)
        for name in held.declared.on_device
        if name.startswith(PERSONAL)
    }


@pytest.fixture(scope="module")
def pulled(setting_of: SettingOf) -> Federated:
    return trained(setting_of({**PLAIN, "local.ditto": 0.5, "evaluation.personal": True}), 2)


def test_the_shared_model_is_that_of_a_run_without_it(setting_of: SettingOf, pulled: Federated) -> None:
    without = trained(setting_of(PLAIN), 2)
    assert_same_bits(dict(pulled.learned().parameters), dict(without.learned().parameters))


def test_copies_are_in_no_update_and_no_plan(pulled: Federated) -> None:
    assert sorted(copies(pulled)) == sorted(pulled.learned().parameters)
    assert not [name for name in pulled._state.parameters if name.startswith(PERSONAL)]
    assert len(np.unique(copies(pulled)["second.bias"], axis=0)) == 60, "everybody has a model"


def test_without_a_pull_a_copy_is_trained_alone(setting_of: SettingOf) -> None:
    """With a lambda of 0, a copy is what one client's federated training of itself comes to."""
    setting = setting_of({**PLAIN, "local.ditto": 0.0})
    whole = copies(trained(setting, 3))
    parts = replace(Federated(setting_of(PLAIN))._parts, local=replace(setting.recipe.local, ditto=None))
    for client in (0, 17):
        who, mine = np.array([client]), dict(Federated(setting)._state.parameters)
        for round in (1, 2, 3):
            update = parts.client.visit(Plan(round, mine, parts.local, train_rows=False), who)
            parts.client.discard()
            mine = {name: value + update.dense[name][0] for name, value in mine.items()}
        for name, value in mine.items():
            np.testing.assert_allclose(whole[name][client], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_great_pull_leaves_the_shared_model_that_was_sent(setting_of: SettingOf) -> None:
    """With ``lr * lambda = 1`` every step ends at ``w - lr grad``, one step away from w however many there are."""
    shared = Federated(setting_of(PLAIN))._state.parameters

    def moved(pull: float, steps: int) -> float:
        given = {**PLAIN, "local.ditto": pull, "local.lr": 0.02, "local.steps": steps}
        held = copies(trained(setting_of(given), 1))
        return float(np.sqrt(sum(np.square(held[name] - shared[name]).sum() for name in held)))

    assert 0 < moved(50.0, 8) < 0.8 * moved(0.0, 8), "where nothing pulls, they go on"


def test_every_client_is_judged_by_its_own_copy(pulled: Federated) -> None:
    learned, task = pulled.learned(), pulled._setting.task
    assert isinstance(task, Histories)
    scorer = task.scorer(learned, "test")
    assert isinstance(scorer, PersonalScorer)
    clients = np.array([4, 4, 33])
    cut = task.population.events(clients).lengths - np.array([1, 3, 1])
    scores = scorer.score_all(clients, cut)
    for case, client in enumerate(clients.tolist()):
        mine = {name: values[client] for name, values in copies(pulled).items()}
        alone = task.scorer(replace(learned, tuned=None, parameters=mine), "test")
        expected = alone.score_all(clients[case : case + 1], cut[case : case + 1])[0]
        np.testing.assert_allclose(scores[case], expected, rtol=1e-4, atol=1e-5)
    assert task.judge(learned, "validation").protocol_label == "sampled, 99 negatives, each client's own model"
    shared = task.judge(replace(learned, tuned=None), "validation")
    assert shared.metrics != task.judge(learned, "validation").metrics


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ditto": -1.0}, "it pulls back"),
        ({"ditto": 1.0, "on_device": ("out",)}, "cannot with local.on_device"),
        ({"ditto": 1.0, "head_first": 1}, "cannot with local.head_first"),
        ({"ditto": 1.0, "control": "scaffold"}, "cannot with local.control"),
    ],
)
def test_what_does_not_go_together_is_refused(given: Mapping[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        LocalSettings(steps=3, **given)


def test_a_model_with_parameters_on_devices_has_no_copies_beside_them() -> None:
    model = cases()["histories"].model
    with pytest.raises(RecipeError, match="own would be trained by two models at once"):
        with_copies(model, LocalSettings(steps=1, ditto=1.0))
    nothing = replace(model, on_device=())
    names = tuple(name for name, _ in nothing.shared.named_parameters())
    with pytest.raises(RecipeError, match="this model has none"):
        with_copies(nothing, LocalSettings(steps=1, ditto=1.0, frozen=names))
    some = with_copies(nothing, LocalSettings(steps=1, ditto=1.0, frozen=names[:1]))
    assert some.on_device == tuple(PERSONAL + name for name in names[1:])
