"""Asynchronous rounds in virtual time: who is at work when, by hand; and the same bits, resumed or in other blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fedtower
from fedtower.core.checkpoint import read_checkpoint
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.recipe import load_recipe
from fedtower.core.registry import discover
from fedtower.core.staleness import AsynchronousSettings
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.traces import Load, Traces
from fedtower.core.transport import Abandoned, Asked, State
from fedtower.core.updates import Updates
from fedtower.plugins.samplers.uniform import Uniform
from fedtower.plugins.transports.virtual_clock.transport import VirtualClock, VirtualLine
from fedtower.recsys.run import resume
from fedtower.recsys.runlog import RunLog

IntArray = NDArray[np.int64]
SETTINGS = AsynchronousSettings(buffer=2, concurrency=3, max_staleness=1)


def load(plan: Plan, clients: IntArray) -> Load:
    """A visit of client c takes 10 (c + 1) seconds."""
    nothing = np.zeros(len(clients))
    return Load(nothing, (clients + 1).astype(np.float64), nothing)


def line(folder: Path, clients: int, vanish: float = 0.0, block: int = 32) -> VirtualLine:
    ones = np.ones(clients)
    path = folder / f"traces-{clients}-{vanish}.csv"
    Traces(0 * ones, 10 * ones, ones, ones, vanish * ones, 0 * ones, 24 * ones).write(path)
    return VirtualClock(traces=str(path), block=block).over(load, Uniform(clients))


@dataclass
class Versions:
    """The server's half: it counts what comes, and keeps what it is handed between versions."""

    line: VirtualLine
    clients: int
    settings: AsynchronousSettings = SETTINGS
    state: State = field(default_factory=dict)
    round: int = 0
    trained: list[tuple[int, list[int]]] = field(default_factory=list)
    most_at_work: int = 0
    refused: set[int] = field(default_factory=set)

    def visit(self, version: int, clients: IntArray) -> Updates:
        self.trained.append((version, clients.tolist()))
        rounds = np.full(len(clients), version)
        return Updates(np.ones(len(clients)), {"w": np.ones((len(clients), 1), np.float32)}, {}, clients, rounds)

    def step(self) -> tuple[list[tuple[int, int]], float]:
        """The version and client of each update that came, and when the step was made."""
        came: list[tuple[int, int]] = []
        counted: list[int] = []
        self.round += 1
        self.line.begin(self.state)
        needed: Callable[[], int] = lambda: self.settings.buffer - len(counted)  # noqa: E731
        asked = Asked(self.settings, needed, self.visit, Draws(3), None, self.state)
        plan = Plan(self.round, {"w": np.zeros(1, np.float32)}, LocalSettings(steps=1))
        version = self.line.version(plan, Cohort(self.round, np.arange(self.clients), self.clients), asked)
        try:
            for block in version.arrivals():
                assert block.clients is not None
                assert block.rounds is not None
                came += zip(block.rounds.tolist(), block.clients.tolist(), strict=True)
                fresh = block.rounds >= self.round - self.settings.max_staleness
                counted += [client for client in block.clients[fresh].tolist() if client not in self.refused]
        finally:
            self.state = version.flight()
            self.spent = version.spent(Cohort(self.round, np.unique(np.array(counted, dtype=np.int64)), self.clients))
        assert len(self.state["clients"]) <= self.settings.concurrency
        return came, self.line.now()


def test_everybody_is_at_work_until_enough_have_come(tmp_path: Path) -> None:
    """Three clients, who all work at once and begin again when they are done and their update is not waiting.

    10 s: client 0. 20 s: client 1: the step. From version 2: client 0 until 30 s, client 1 until 40 s. Client 2, of
    version 1, comes at 30 s too: of two that come together, the lower number is first.
    """
    versions = Versions(line(tmp_path, 3), 3)
    assert versions.step() == ([(1, 0), (1, 1)], 20.0)
    assert list(zip(versions.state["clients"].tolist(), versions.state["ends"].tolist(), strict=True)) == [(2, 30.0)]
    assert versions.step() == ([(1, 2), (2, 0)], 30.0)
    assert versions.trained == [(1, [0, 1, 2]), (2, [0, 1])], "those of one version together"
    assert (versions.spent.seconds, versions.spent.wasted) == (40.0, 0.0)


def test_no_more_work_at_once_than_may(tmp_path: Path) -> None:
    settings = AsynchronousSettings(buffer=1, concurrency=2, max_staleness=9)
    versions = Versions(line(tmp_path, 5), 5, settings)
    order = np.argsort(Draws(3).uniform("begin", 1, np.arange(5)))[:2].tolist()
    (came, now), first = versions.step(), min(order)
    assert came == [(1, first)]
    assert now == 10.0 * (first + 1)
    assert len(versions.state["clients"]) == 2, "another begins when there is room"
    assert max(order) in versions.state["clients"]


def test_who_is_too_stale_comes_is_not_trained_and_counts_as_waste(tmp_path: Path) -> None:
    settings = AsynchronousSettings(buffer=1, concurrency=5, max_staleness=1)
    versions = Versions(line(tmp_path, 5, block=1), 5, settings)
    # Client 0 begins again in each version. Client 1, of version 1, comes at 20 s, just after it, and client 2 at 30 s.
    came = [versions.step() for _ in range(4)]
    assert came == [([(1, 0)], 10.0), ([(2, 0)], 20.0), ([(1, 1), (3, 0)], 30.0), ([(1, 2), (4, 0)], 40.0)]
    assert [clients[0] for _, clients in versions.trained] == [0] * 4, (
        "who was not trained before it was too late is not"
    )
    assert (versions.spent.seconds, versions.spent.wasted, versions.spent.late) == (40.0, 30.0, 1)


def test_who_vanishes_makes_room_and_is_told_as_waste(tmp_path: Path) -> None:
    versions = Versions(line(tmp_path, 4, vanish=1.0), 4)
    with pytest.raises(Abandoned, match="nobody else was on the way; 0 of 2 updates"):
        versions.step()
    until = Draws(3).uniform("vanish/when", 1, np.arange(4)) * 10.0 * np.arange(1, 5)
    assert versions.spent.wasted == versions.spent.seconds == pytest.approx(until.sum())
    assert versions.spent.late == 0
    assert versions.trained == []


def test_who_has_come_when_a_version_is_abandoned_waits_for_the_next(tmp_path: Path) -> None:
    versions = Versions(line(tmp_path, 1), 1)
    with pytest.raises(Abandoned, match="1 of 2 updates wait for the next version"):
        versions.step()
    assert versions.trained == []
    versions.settings = AsynchronousSettings(buffer=1, concurrency=3, max_staleness=1)
    assert versions.step() == ([(1, 0)], 10.0)


def test_another_comes_in_the_place_of_one_that_is_refused(tmp_path: Path) -> None:
    versions = Versions(line(tmp_path, 3), 3, refused={0})
    assert versions.step() == ([(1, 0), (1, 1), (1, 2)], 30.0)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_width_of_blocks_changes_nothing_but_what_is_trained_together(tmp_path: Path, block: int) -> None:
    settings = AsynchronousSettings(buffer=4, concurrency=7, max_staleness=2)
    wide, narrow = (Versions(line(tmp_path, 20, 0.3, width), 20, settings) for width in (32, block))
    for _ in range(12):
        assert wide.step() == narrow.step()
        assert_same_bits(wide.state, narrow.state)
    assert max(len(clients) for _, clients in narrow.trained) <= block


def test_it_goes_on_from_its_state_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    settings = AsynchronousSettings(buffer=4, concurrency=7, max_staleness=2)
    whole = Versions(line(tmp_path, 20, 0.3), 20, settings)
    steps = [whole.step() for _ in range(10)]
    cut = Versions(line(tmp_path, 20, 0.3), 20, settings)
    for _ in range(4):
        cut.step()
    state = {name: value.copy() for name, value in cut.state.items()}
    other = Versions(line(tmp_path, 20, 0.3), 20, settings, state, round=4)
    assert [other.step() for _ in range(6)] == steps[4:]


SMALL: dict[str, Any] = {
    "data.users": 60,
    "data.items": 220,
    "data.mean_events": 30,
    "model.dim": 8,
    "model.hidden": 16,
    "model.user_vector": True,
    "local.batch_size": 8,
    "local.negatives": 10,
    "local.history_length": 10,
    "cohort.size": 12,
    "rounds": 8,
    "evaluation.every": 0,
    "evaluation.negatives": 10,
    "checkpoint.every": 4,
    "transforms.0.name": "clip",
    "transforms.0.norm": 0.5,
    "transport.name": "virtual_clock",
    "transport.devices.step_spread": 1.5,
    "asynchronous.buffer": 4,
    "asynchronous.concurrency": 10,
    "asynchronous.max_staleness": 3,
}


def test_a_run_that_was_stopped_or_goes_in_other_blocks_ends_with_the_same_bits(tmp_path: Path) -> None:
    run = fedtower.run("dssm-synthetic", SMALL, runs=tmp_path)
    whole = read_checkpoint(run.folder / "checkpoints", 8)
    staleness = [event["staleness"] for event in RunLog(run.folder).record().rounds]
    assert max(each["max"] for each in staleness) >= 2
    resume(run.folder, start=4)
    again = read_checkpoint(run.folder / "checkpoints", 8)
    assert_same_bits(again, whole)
    assert {name for name in whole if name.startswith("transport/kept/")}
    narrow = fedtower.run("dssm-synthetic", {**SMALL, "transport.block": 3}, runs=tmp_path)
    assert_same_bits(read_checkpoint(narrow.folder / "checkpoints", 8), whole)
    moved = np.abs(whole["parameters/mixture"] - read_checkpoint(run.folder / "checkpoints", 4)["parameters/mixture"])
    assert moved.max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"transport.name": "in_process"}, r'"in_process" cannot be used with \[asynchronous\].* virtual_clock can'),
        ({"aggregator.name": "holding"}, r'aggregator\.name = "holding" cannot be used with .*fedavg'),
        ({"asynchronous.buffer": 13}, r"asynchronous\.buffer \(13\) is more than cohort\.size \(12\)"),
        ({"deadline.name": "fixed", "deadline.seconds": 5.0}, "deadline is for rounds that wait"),
        ({"cohort.over_selection": 1.5}, r"cohort\.over_selection is for rounds that wait"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_when_it_is_read(settings: dict[str, Any], said: str) -> None:
    registry = discover()
    registry.aggregator("holding", "fedtower.plugins.aggregators.fedavg:FedAvg")  # it does not say that it can
    given = {key: value for key, value in SMALL.items() if not key.startswith("transport.devices")}
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**given, **settings}.items()]
    with pytest.raises(RecipeError, match=said):
        load_recipe("dssm-synthetic", overrides, registry)
