"""Cohorts by number of examples: how often each client is in, and what the mean of a cohort is on average."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.cohort import IntArray
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.round import make_plan
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.samplers.by_examples import ByExamples
from fedtower.recsys.tasks import make_task
from fedtower.recsys.training import Federated, Setting

HELD = np.array([5, 0, 40, 1, 30, 24, 60, 10, 50, 20])  # 240, and 4 * 60 of them: the sixth is in every cohort of four
ROUNDS = 3_000


def appearances(size: int, held: IntArray) -> NDArray[np.bool_]:
    """Who is in the cohort of which round, (R, C)."""
    sampler = ByExamples(size).knowing(held)
    found = np.zeros((ROUNDS, len(held)), dtype=bool)
    for round in range(ROUNDS):
        found[round, sampler.sample(round, len(held), Draws(5)).clients] = True
    return found


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_client_is_in_by_its_share_of_all_examples(size: int) -> None:
    found, chance = appearances(size, HELD), size * HELD / HELD.sum()
    assert set(found.sum(axis=1).tolist()) == {size}
    deviation = np.sqrt(chance * (1 - chance) / ROUNDS)
    assert np.all(np.abs(found.mean(axis=0) - chance) <= 4 * deviation + 1e-12)


def test_the_plain_mean_of_a_cohort_is_the_mean_over_all_examples_on_average() -> None:
    delta = np.random.default_rng(3).normal(size=len(HELD)) * 10
    means = (appearances(3, HELD) * delta).sum(axis=1) / 3
    wanted = (HELD / HELD.sum() * delta).sum()
    error = means.std() / np.sqrt(ROUNDS)
    assert abs(means.mean() - wanted) < 4 * error
    assert abs(delta.mean() - wanted) > 8 * error, "a uniform cohort would be told apart"


def test_any_two_clients_may_meet() -> None:
    found = appearances(3, HELD).astype(np.int64)
    together = found.T @ found
    some = HELD >= 5
    assert np.all(together[np.ix_(some, some)] > 0)


def test_of_few_who_are_there_the_greatest_are_in_for_certain() -> None:
    few = ByExamples(3).knowing(HELD).among(np.array([6, 3, 1, 7]))
    seen = [few.sample(round, 4, Draws(1)).clients.tolist() for round in range(50)]
    assert {tuple(clients) for clients in seen} == {(0, 1, 3)}, "all who hold something"
    two = ByExamples(2).knowing(HELD).among(np.array([6, 3, 7, 3]))
    seen = [two.sample(round, 4, Draws(1)).clients.tolist() for round in range(400)]
    assert all(clients[0] == 0 and len(clients) == 2 for clients in seen)
    assert 0.7 < np.mean([clients[1] == 2 for clients in seen]) < 0.95, "ten of the other twelve examples"


def test_who_would_be_in_twice_is_told_of_with_a_size_that_works() -> None:
    with pytest.raises(RecipeError, match=r"client 6, who holds 60 of 240, more than once.*to at most 4,"):
        ByExamples(5).knowing(HELD)
    with pytest.raises(RecipeError, match="nobody holds one"):
        ByExamples(1).knowing(np.zeros(3, dtype=np.int64))
    with pytest.raises(RecipeError, match=r"cohort\.size must be at least 1"):
        ByExamples(0)


def setting(*more: str) -> Setting:
    registry = discover()
    given = [
        "data.users=60",
        "data.items=200",
        "data.mean_events=40",
        "model.dim=8",
        "model.hidden=8",
        "runtime.name=torch_loop",
    ]
    recipe = load_recipe("dssm-synthetic", [*given, "cohort.name=by_examples", "cohort.size=6", *more], registry)
    draws = Draws(recipe.seed)
    people = registry.make("dataset", recipe.data.part).load(draws=draws, progress=lambda message: None)
    return Setting(recipe, registry, make_task(people, recipe, draws), Hooks.none(), draws, time.monotonic)


def test_a_run_draws_by_the_examples_that_a_client_trains_on() -> None:
    whole = setting("aggregator.weights=equal")
    held = whole.task.examples_held
    local = replace(whole.recipe.local, steps=None, epochs=1)
    training = Federated(whole)
    everybody = np.arange(60)
    work = whole.task.client_data().work(replace(make_plan(training._state, training._parts), local=local), everybody)
    assert_same_bits(held, work.examples)
    wanted = ByExamples(6).knowing(held).sample(1, 60, whole.draws)
    assert_same_bits(training._parts.sampler.sample(1, 60, whole.draws).clients, wanted.clients)
    next(training.rounds())


def test_among_those_who_are_there_a_share_is_of_theirs() -> None:
    training = Federated(setting("aggregator.weights=equal", "transport.name=virtual_clock"))
    report = next(training.rounds())
    assert report.clients


@pytest.mark.parametrize("weighing", ["aggregator.weights=examples", "aggregator.name=fednova"])
def test_an_aggregator_that_weighs_by_examples_again_is_refused(weighing: str) -> None:
    with pytest.raises(RecipeError, match="examples would count twice"):
        setting(weighing)


def test_over_devices_nobody_knows_how_many_they_hold() -> None:
    with pytest.raises(RecipeError, match="one that claims most would be in every cohort"):
        Federated(setting("aggregator.weights=equal", "mode=deployed"))
