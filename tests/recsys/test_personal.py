"""Models that clients tune for themselves before they judge: against one client after another, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtower.core.draws import Draws
from fedtower.core.round import make_plan
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.models import SequenceTower
from fedtower.recsys.personal import PersonalScorer
from fedtower.recsys.tasks import Histories
from fedtower.recsys.testing.states import everything
from fedtower.recsys.training import Federated, Setting

SettingOf = Callable[..., Setting]
ITEMS = 200


@pytest.fixture(scope="module")
def trained(setting_of: SettingOf) -> Federated:
    """A model after two rounds, whose clients tune it before they judge."""
    training = Federated(setting_of({"evaluation.personal": True, "local.row_lr": 2.0}))
    for report, _ in zip(training.rounds(), range(2), strict=False):
        if report.round == 2:
            break
    return training


@pytest.fixture(scope="module")
def task(trained: Federated) -> Histories:
    task = trained._setting.task
    assert isinstance(task, Histories)
    return task


def slow_scores(training: Federated, task: Histories, client: int, cut: int) -> Any:
    """One client's visit, and then the whole catalogue scored with what it left."""
    who = np.array([client])
    side, learned = training._parts.client, training.learned()
    assert learned.tuned is not None
    assert learned.rows is not None
    plan = make_plan(training._state, training._parts)
    update = side.visit(plan, who)
    own = side.staged[-1].states["user_vector"][0]
    side.discard()
    rows = learned.rows.fetch("item", np.arange(ITEMS)).copy()
    part = update.rows["item"]
    rows[part.row_ids] += part.row_deltas
    tower = learned.declared.shared
    assert isinstance(tower, SequenceTower)
    events = task.population.events(who)
    role = task.split.parts(events).role
    items = events.items[:cut][role[:cut] < 2][-20:]
    with torch.no_grad():
        for name, value in tower.named_parameters():
            value.copy_(
                torch.from_numpy(own if name == "user_vector" else plan.parameters[name] + update.dense[name][0])
            )
        user = torch.from_numpy(task.population.user_features(who)[0])
        vector = tower.represent(torch.from_numpy(rows[items]), torch.tensor([len(items)]), user)
        return tower.score(vector, torch.from_numpy(rows))[0].numpy()


def test_every_client_is_scored_by_what_its_own_visit_left(setting_of: SettingOf) -> None:
    training = Federated(setting_of({"evaluation.personal": True, "local.row_lr": 2.0, "transforms": []}))
    next(training.rounds())
    task = training._setting.task
    assert isinstance(task, Histories)
    clients = np.array([0, 7, 7, 31, 59])
    cut = task.population.events(clients).lengths - np.array([1, 1, 5, 1, 1])
    scorer = task.scorer(training.learned(), "test")
    assert isinstance(scorer, PersonalScorer)
    everything_scored = scorer.score_all(clients, cut)
    candidates = Draws(3).integers(ITEMS, "candidates", np.arange(5)[:, None], np.arange(12)[None])
    some = scorer.score(clients, cut, candidates)
    for case, client in enumerate(clients.tolist()):
        expected = slow_scores(training, task, client, int(cut[case]))
        np.testing.assert_allclose(everything_scored[case], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(some[case], expected[candidates[case]], rtol=1e-4, atol=1e-5)


def test_who_else_is_asked_for_changes_no_bit(trained: Federated, task: Histories) -> None:
    scorer = task.scorer(trained.learned(), "test")
    clients = np.arange(60) * 7 % 60
    cut = task.population.events(clients).lengths - 1
    whole = scorer.score_all(clients, cut)
    for wanted in ([0], [5, 3, 5], [59, 1, 20, 21]):
        assert_same_bits(scorer.score_all(clients[wanted], cut[wanted]), whole[wanted])
        assert_same_bits(scorer.vectors(clients[wanted], cut[wanted]), scorer.vectors(clients, cut)[wanted])


def test_judging_leaves_the_training_as_it_was(trained: Federated, task: Histories) -> None:
    before = everything(trained)
    figures = task.judge(trained.learned(), "validation")
    assert_same_bits(everything(trained), before)
    assert figures.protocol_label == "sampled, 99 negatives, models fine-tuned"
    assert task.judge(trained.learned(), "validation").metrics == figures.metrics


def test_tuning_changes_what_is_measured(trained: Federated, task: Histories) -> None:
    learned = trained.learned()
    tuned, sent = (task.judge(each, "validation") for each in (learned, replace(learned, tuned=None)))
    assert tuned.metrics != sent.metrics


def test_nobody_tunes_for_devices(setting_of: SettingOf) -> None:
    """Over devices each of them does so itself, and what is judged here is what they are sent."""
    assert Federated(setting_of({"evaluation.personal": True, "mode": "deployed"})).learned().tuned is None
