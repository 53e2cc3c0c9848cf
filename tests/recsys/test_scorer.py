"""ModelScorer: the slow, obvious scores, to the same bits whoever else is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.evaluation import evaluate
from fedtower.recsys.history import TRAIN, VALIDATION, Moment
from fedtower.recsys.models import SequenceTower
from fedtower.recsys.run import Run
from fedtower.recsys.scorer import ModelScorer
from fedtower.recsys.tables import CloudTables
from fedtower.recsys.tasks import Histories
from fedtower.recsys.training import Assembled, Setting, assemble

DRAWS = Draws(8)
CLIENTS, ITEMS, LENGTH = 60, 200, 20


def tables_of(model: Assembled) -> CloudTables:
    assert model.tables is not None
    return model.tables


@pytest.fixture(scope="module")
def setting(setting_of: Callable[..., Setting]) -> Setting:
    return setting_of()


@pytest.fixture(scope="module")
def task(setting: Setting) -> Histories:
    """Users, their split, and how they are judged."""
    assert isinstance(setting.task, Histories)
    return setting.task


@pytest.fixture(scope="module")
def model(setting: Setting) -> Assembled:
    """A model in which nothing is at its first value, and two of three users have a vector of their own."""
    model = assemble(setting)
    width = model.declared.cloud.width
    for step in range(3):
        ids = np.arange(ITEMS, dtype=np.int64)
        deltas = DRAWS.normal("delta", step, ids[:, None], np.arange(width)[None]).astype(np.float32)
        tables_of(model).apply({"item": (ids, deltas)}, 1.0)
    some = np.array([client for client in range(CLIENTS) if client % 3], dtype=np.int64)
    vectors = DRAWS.normal("own", some[:, None], np.arange(8)[None]).astype(np.float32)
    model.store.write("user_vector", some, vectors)
    return model


@pytest.fixture(scope="module")
def parameters(model: Assembled) -> Mapping[str, NDArray[np.float32]]:
    return {
        name: value + 0.1 * DRAWS.normal(name, np.arange(value.size)).reshape(value.shape).astype(np.float32)
        for name, value in model.declared.parameters().items()
    }


@pytest.fixture(scope="module")
def scorer(model: Assembled, task: Histories, parameters: Mapping[str, Any]) -> ModelScorer:
    return task.scorer(model.learned(parameters), "test")


def cases(task: Histories, wanted: Iterable[int] | None = None) -> tuple[Any, Any, Any]:
    """Clients, cuts and candidates of 150 cases, or of some of them: different histories, and some clients twice."""
    which = np.arange(150) if wanted is None else np.array(list(wanted), dtype=np.int64)
    clients = which * 7 % CLIENTS
    lengths = task.population.events(np.arange(CLIENTS)).lengths[clients]
    cut = DRAWS.integers(lengths + 1, "cut", which)
    candidates = DRAWS.integers(ITEMS, "candidates", which[:, None], np.arange(30)[None])
    candidates[which % 4 == 0, 25:] = -1
    return clients, cut, candidates


def slow_vector(
    task: Histories, model: Assembled, parameters: Mapping[str, Any], client: int, cut: int, before: int
) -> Any:
    """The user vector of one case, one event after another; events of roles below ``before`` count."""
    events = task.population.events(np.array([client]))
    role = task.split.parts(events).role
    items = [int(item) for item, r in zip(events.items[:cut], role[:cut], strict=True) if r < before][-LENGTH:]
    tower = model.declared.shared
    assert isinstance(tower, SequenceTower)
    given = {**parameters, "user_vector": model.store.read("user_vector", np.array([client]))[0]}
    user = torch.from_numpy(task.population.user_features(np.array([client]))[0])
    with torch.no_grad():
        for name, value in tower.named_parameters():
            value.copy_(torch.from_numpy(np.array(given[name])))
        rows = torch.from_numpy(tables_of(model).fetch("item", np.array(items, dtype=np.int64)))
        return tower.represent(rows, torch.tensor([len(items)]), user)


@pytest.mark.parametrize(("moment", "before"), [("validation", VALIDATION), ("test", VALIDATION + 1), ("now", 3)])
def test_scores_are_those_of_a_direct_slow_computation(
    task: Histories, model: Assembled, parameters: Mapping[str, Any], moment: Moment, before: int
) -> None:
    scorer = task.scorer(model.learned(parameters), moment)
    tower = model.declared.shared
    assert isinstance(tower, SequenceTower)
    clients, cut, candidates = cases(task)
    cut[:10] = task.population.events(clients[:10]).lengths  # to the very end: held-out events are before it
    cut[10:14] = 0
    some, everything, vectors = scorer.score(clients, cut, candidates), scorer.score_all(clients, cut), []
    catalogue = torch.from_numpy(tables_of(model).fetch("item", np.arange(ITEMS)))
    for case, client in enumerate(clients.tolist()):
        vector = slow_vector(task, model, parameters, client, int(cut[case]), before)
        with torch.no_grad():
            expected = tower.score(vector, catalogue)[0].numpy()
        vectors.append(vector[0].numpy())
        np.testing.assert_allclose(everything[case], expected, rtol=1e-4, atol=1e-5)
        real = candidates[case] >= 0
        np.testing.assert_allclose(some[case, real], expected[candidates[case, real]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scorer.vectors(clients, cut), np.stack(vectors), rtol=1e-4, atol=1e-5)


def test_each_moment_sees_one_event_more(task: Histories, model: Assembled, parameters: Mapping[str, Any]) -> None:
    clients = np.arange(5, dtype=np.int64)
    events = task.population.events(clients)
    assert task.split.parts(events).role[-3:].tolist() == [TRAIN, VALIDATION, 2]
    lengths = events.lengths
    at = {m: task.scorer(model.learned(parameters), m) for m in ("validation", "test", "now")}
    assert_same_bits(at["validation"].vectors(clients, lengths), at["validation"].vectors(clients, lengths - 2))
    assert_same_bits(at["test"].vectors(clients, lengths), at["test"].vectors(clients, lengths - 1))
    assert (at["now"].vectors(clients, lengths) != at["test"].vectors(clients, lengths)).any(axis=1).all()
    assert (at["test"].vectors(clients, lengths) != at["validation"].vectors(clients, lengths)).any(axis=1).all()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 149), min_size=1, max_size=150))
def test_scores_do_not_depend_on_which_other_cases_are_asked_for(
    task: Histories, scorer: ModelScorer, wanted: list[int]
) -> None:
    clients, cut, candidates = cases(task)
    all_some, all_everything = scorer.score(clients, cut, candidates), scorer.score_all(clients, cut)
    again = cases(task, wanted)
    assert_same_bits(again[0], clients[wanted])
    assert_same_bits(scorer.score(*again), all_some[wanted])
    assert_same_bits(scorer.score_all(*again[:2]), all_everything[wanted])
    assert_same_bits(scorer.vectors(*again[:2]), scorer.vectors(clients, cut)[wanted])


def test_padding_scores_minus_infinity_and_changes_nothing_else(task: Histories, scorer: ModelScorer) -> None:
    clients, cut, candidates = cases(task)
    scores = scorer.score(clients, cut, candidates)
    assert_same_bits(np.isneginf(scores), candidates < 0)
    assert_same_bits(scorer.score(clients, cut, np.maximum(candidates, 0))[candidates >= 0], scores[candidates >= 0])
    assert scores.dtype == np.float32


def test_nobody_asks_for_nothing(scorer: ModelScorer) -> None:
    none = np.zeros(0, dtype=np.int64)
    assert scorer.score(none, none, np.zeros((0, 5), dtype=np.int64)).shape == (0, 5)
    assert scorer.score_all(none, none).shape == (0, ITEMS)


def test_a_users_own_vector_counts_for_nobody_else(
    task: Histories, model: Assembled, parameters: Mapping[str, Any]
) -> None:
    clients = np.array([1, 2, 3], dtype=np.int64)
    cut = np.full(3, 5, dtype=np.int64)
    before = task.scorer(model.learned(parameters), "test").vectors(clients, cut)
    kept = model.store.read("user_vector", clients)
    try:
        model.store.write("user_vector", np.array([2]), kept[1:2] + 1)
        after = task.scorer(model.learned(parameters), "test").vectors(clients, cut)
    finally:
        model.store.write("user_vector", np.array([2]), kept[1:2])
    assert_same_bits(after[[0, 2]], before[[0, 2]])
    np.testing.assert_allclose(after[1] - before[1], 1.0, rtol=1e-5)


@pytest.mark.parametrize("protocol", ["sampled", "full"])
@pytest.mark.parametrize("mode", ["federated", "standalone"])
def test_figures_of_a_trained_model_do_not_depend_on_the_batch_size(
    request: pytest.FixtureRequest, mode: str, protocol: Any
) -> None:
    run: Run = request.getfixturevalue(f"{mode}_run")
    trained = run.trained
    setting, task = trained.setting, trained.setting.task
    assert isinstance(task, Histories)
    scorer = task.scorer(trained.training.learned(), "test")
    settings = replace(setting.recipe.evaluation, protocol=protocol, k=(1, 5, 10))
    results = [
        evaluate(scorer, task.population, task.split, "test", replace(settings, batch_size=size), setting.draws)
        for size in (7, 512, 1)
    ]
    assert results[0] == results[1] == results[2]
    assert 0 < results[0].metrics["HR@10"] < 1
