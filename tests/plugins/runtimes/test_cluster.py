"""A crew on a Ray cluster: a real one, of two cores, on this machine's loopback."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fedtower.core.draws import Draws
from fedtower.core.errors import MissingDependency
from fedtower.core.hooks import Hooks
from fedtower.core.plan import Plan
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.testing.promises import assert_same_bits
from fedtower.plugins.runtimes.vectorized import cluster
from fedtower.plugins.runtimes.vectorized.cluster import ClusterError, Remote
from fedtower.plugins.runtimes.vectorized.crew import Crew
from fedtower.plugins.runtimes.vectorized.runtime import Vectorized
from fedtower.recsys.tasks import make_task
from fedtower.recsys.testing.examples import Case, cases
from fedtower.recsys.training import Federated, Setting

CASES = cases()
PLAIN = Vectorized(compile=False)
ON_RAY = Vectorized(compile=False, workers=2, cluster="local")
SMALL = (
    *("data.users=60", "data.items=200", "data.mean_events=40", "model.dim=8", "model.user_vector=true"),
    *("local.batch_size=16", "local.negatives=20", "local.history_length=20", "cohort.size=12", "rounds=3"),
    *('runtime.name="vectorized"', "runtime.compile=false"),
    *('transport.name="in_process"', "transport.block=7"),
)


@pytest.fixture(scope="module", autouse=True)
def one_cluster() -> Iterator[None]:
    """The first crew begins it; it ends with this module."""
    torch.set_num_threads(1)
    yield
    import ray  # not above: how it is imported decides what it listens on

    ray.shutdown()


@pytest.fixture(scope="module")
def crew() -> Iterator[tuple[Case, Plan, Crew]]:
    case = CASES["histories"]
    plan = case.plan()
    opened = ON_RAY.open(case.model, plan.local)
    assert isinstance(opened, Crew)
    yield case, plan, opened
    opened.close()


def run(*overrides: str) -> Federated:
    """Three rounds of a small run."""
    recipe = load_recipe("dssm-synthetic", [*SMALL, *overrides], registry := discover())
    draws = Draws(recipe.seed)
    data = registry.make("dataset", recipe.data.part).load(draws=draws, progress=lambda message: None)
    task = make_task(data, recipe, draws)
    training = Federated(Setting(recipe, registry, task, Hooks.none(), draws, time.monotonic))
    assert len(list(training.rounds())) == 3
    return training


def test_a_whole_run_has_the_same_bits_on_a_cluster() -> None:
    there = run("runtime.workers=2", 'runtime.cluster="local"').snapshot()
    assert_same_bits(there, run().snapshot())
    assert_same_bits(there, run("runtime.workers=2").snapshot())


def test_every_kind_of_work_has_the_same_bits_on_a_cluster(crew: tuple[Case, Plan, Crew]) -> None:
    case, plan, opened = crew
    work = case.work(clients=9)
    for part in (plan, replace(plan, round=plan.round + 1)):
        wanted, own = PLAIN.open(case.model, plan.local).train(part, work)
        updates, states = opened.train(part, work)
        assert_same_bits(updates, wanted)
        assert_same_bits(dict(states), dict(own))


def test_another_worker_does_the_share_of_a_killed_one_again(crew: tuple[Case, Plan, Crew]) -> None:
    case, plan, opened = crew
    work = case.work(clients=9)
    wanted, _ = opened.train(plan, work)
    victim = opened._workers[1]
    assert isinstance(victim, Remote)
    os.kill(victim.pid, signal.SIGKILL)
    assert_same_bits(opened.train(plan, work)[0], wanted)
    assert opened._workers[1] is not victim


def test_a_worker_that_finds_no_core_is_told_of(crew: tuple[Case, Plan, Crew], monkeypatch: pytest.MonkeyPatch) -> None:
    case, plan, opened = crew
    opened.train(plan, case.work(clients=2))  # has both cores
    monkeypatch.setattr(cluster, "PATIENCE_SECONDS", 0.5)
    other = ON_RAY.open(case.model, plan.local)
    with pytest.raises(ClusterError, match=r"found no core .* has 2 cores, of which 0 are free; lower runtime.workers"):
        other.train(plan, case.work(clients=2))


def test_a_cluster_that_is_not_there_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at .*'nowhere:port'.*ray start --head"):
        cluster.connect("nowhere:port", 2)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    case = CASES["clicks"]
    plan = case.plan()
    with pytest.raises(MissingDependency, match=r"'local' needs ray, which is not installed; .*fedtower\[ray\]"):
        ON_RAY.open(case.model, plan.local).train(plan, case.work(clients=2))


def test_opening_alone_connects_to_nothing() -> None:
    opened = replace(ON_RAY, cluster="nowhere:1").open(CASES["clicks"].model, CASES["clicks"].plan().local)
    assert isinstance(opened, Crew)
    assert not opened._workers
