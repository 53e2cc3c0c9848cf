"""Virtual time: who comes when by hand, who is trained and who is not, the clock, and what devices did for nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.cohort import Cohort
from fedtower.core.deadline import ARRIVED
from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.core.plan import Plan
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.testing.transport import TransportPromises
from fedtower.core.traces import HOUR, DeviceSettings, Load, Traces
from fedtower.core.transport import DeviceTime
from fedtower.core.updates import Updates
from fedtower.plugins.samplers.uniform import Uniform
from fedtower.plugins.transports.virtual_clock.transport import VirtualClock, VirtualLine

IntArray = NDArray[np.int64]

# Ten seconds a step, and nothing else takes time: a visit takes ten times a client's steps.
STEPS = np.array([3.0, 1.0, 2.0, 5.0, 4.0])


def load(plan: Plan, clients: IntArray) -> Load:
    nothing = np.zeros(len(clients))
    return Load(nothing, STEPS[clients], nothing)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Five devices that are always there; the last one always vanishes."""
    ones = np.ones(5)
    made = Traces(0 * ones, 10 * ones, ones, ones, np.array([0.0, 0.0, 0.0, 0.0, 1.0]), 0 * ones, 24 * ones)
    made.write(tmp_path / "traces.csv")
    return tmp_path / "traces.csv"


class Visiting:
    """Notes who was visited, block by block."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []

    def __call__(self, plan: Plan, clients: IntArray) -> Updates:
        self.blocks.append(clients.tolist())
        return Updates(np.ones(len(clients)), clients=clients)


def line(traces: Path, **settings: object) -> VirtualLine:
    made = VirtualClock(traces=str(traces), **settings).over(load, Uniform(3))  # type: ignore[arg-type]
    made.begin({})
    return made


def everybody(target: int | None = None) -> Cohort:
    return Cohort(1, np.arange(5), 5, target)


def vanished_at(draws: Draws) -> float:
    """When client 4 vanishes: the share of its 40 s."""
    return 40.0 * float(draws.uniform("vanish/when", 1, np.array([4]))[0])


def test_updates_come_in_the_order_of_virtual_time(traces: Path) -> None:
    visiting, made = Visiting(), line(traces, block=2)
    blocks = []
    for block in made.exchange(examples.plan(), everybody(), visiting, Draws(7), None):
        assert block.clients is not None
        blocks.append((block.clients.tolist(), block.metrics[ARRIVED].tolist(), made.now()))
    assert blocks == [([1, 2], [10.0, 20.0], 20.0), ([0, 3], [30.0, 50.0], 50.0)]
    assert made.now() == 50.0  # the server has nobody else to wait for
    spent = made.spent(Cohort(1, np.array([0, 1, 2, 3]), 5))
    assert spent.wasted == pytest.approx(vanished_at(Draws(7)))
    assert spent.seconds == pytest.approx(110.0 + vanished_at(Draws(7)))
    assert spent.late == 0


def test_who_would_come_after_the_deadline_is_not_trained_and_told_as_waste(traces: Path) -> None:
    visiting, made = Visiting(), line(traces)
    list(made.exchange(examples.plan(), everybody(), visiting, Draws(7), 30.0))
    assert visiting.blocks == [[1, 2]]  # client 0 would come at the deadline itself
    assert made.now() == 30.0
    spent = made.spent(Cohort(1, np.array([1, 2]), 5))
    assert spent.late == 2
    assert spent.wasted == pytest.approx(30.0 + 50.0 + vanished_at(Draws(7)))


def test_up_to_the_target_there_are_blocks_and_then_one_by_one(traces: Path) -> None:
    visiting, made = Visiting(), line(traces)
    exchange = made.exchange(examples.plan(), everybody(target=2), visiting, Draws(7), None)
    next(exchange)
    assert (visiting.blocks, made.now()) == ([[1, 2]], 20.0)  # nobody else is trained, unless one is asked for
    next(exchange)
    assert (visiting.blocks, made.now()) == ([[1, 2], [0]], 30.0)


def test_rounds_follow_one_another_and_state_says_when(traces: Path) -> None:
    made, again = line(traces), line(traces)
    list(made.exchange(examples.plan(), everybody(), Visiting(), Draws(7), 25.0))
    again.begin(made.state())
    assert again.now() == made.now() == 25.0
    list(again.exchange(examples.plan(2), Cohort(2, np.arange(5), 5), Visiting(), Draws(7), 25.0))
    assert again.now() == 50.0
    assert_same_bits(made.state(), {"now": np.array(25.0)})


def test_the_share_of_an_upload_that_is_sent_shortens_it(tmp_path: Path) -> None:
    one = np.ones(1)
    Traces(0 * one, 0 * one, 10 * one, 5 * one, 0 * one, 0 * one, 24 * one).write(tmp_path / "one.csv")

    def bytes_only(plan: Plan, clients: IntArray) -> Load:
        return Load(np.array([20.0]), np.zeros(1), np.array([40.0]))

    for share, seconds in ((1.0, 10.0), (0.25, 4.0)):
        made = VirtualClock(traces=str(tmp_path / "one.csv"), upload_share=share).over(bytes_only, Uniform(1))
        made.begin({})
        list(made.exchange(examples.plan(), Cohort(1, np.arange(1), 1), Visiting(), Draws(7), None))
        assert made.now() == seconds


def test_the_cohort_is_chosen_among_those_who_are_there() -> None:
    made = VirtualClock(start_hour=3.0).over(load, Uniform(50))
    made.begin({})
    cohort = made.sample(1, 1_000, Draws(7))
    assert len(cohort) == 50
    there = made.traces(1_000, Draws(7)).there(1_000, 3 * HOUR)
    assert np.all(there[cohort.clients])
    assert not np.all(there)
    assert not np.array_equal(cohort.clients, made.sample(2, 1_000, Draws(7)).clients)


def test_the_server_waits_until_somebody_comes(tmp_path: Path) -> None:
    one = np.ones(1)
    Traces(0 * one, 0 * one, one, one, 0 * one, 0.5 * one, one).write(tmp_path / "one.csv")
    made = line(tmp_path / "one.csv")
    assert made.sample(1, 3, Draws(7)).clients.tolist() == [0, 1, 2]
    assert made.now() == 0.5 * HOUR


def test_if_nobody_ever_comes_that_is_said(tmp_path: Path) -> None:
    one = np.ones(1)
    Traces(0 * one, 0 * one, one, one, 0 * one, 0 * one, 0 * one).write(tmp_path / "one.csv")
    with pytest.raises(DataError, match="nobody of 3 clients is there at any hour"):
        line(tmp_path / "one.csv").sample(1, 3, Draws(7))


def test_who_is_not_there_does_not_even_begin(tmp_path: Path) -> None:
    both = np.ones(2)
    Traces(0 * both, both, both, both, 0 * both, np.array([0.0, 12.0]), 6 * both).write(tmp_path / "two.csv")
    visiting, made = Visiting(), line(tmp_path / "two.csv")
    list(made.exchange(examples.plan(), Cohort(1, np.arange(2), 2), visiting, Draws(7), None))
    assert visiting.blocks == [[0]]
    assert made.spent(Cohort(1, np.array([0]), 2)) == DeviceTime(seconds=3.0, wasted=0.0, late=0)


def test_of_a_large_population_only_the_cohort_is_looked_at() -> None:
    asked: list[int] = []

    def noting(plan: Plan, clients: IntArray) -> Load:
        asked.extend(clients.tolist())
        same = np.ones(len(clients))
        return Load(1e5 * same, 10 * same, 1e5 * same)

    made, visiting = VirtualClock().over(noting, Uniform(100)), Visiting()
    made.begin({})
    cohort = made.sample(1, 100_000, Draws(7))
    list(made.exchange(examples.plan(), cohort, visiting, Draws(7), 100.0))
    assert asked == cohort.clients.tolist()
    assert 50 < sum(map(len, visiting.blocks)) < 100


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"block": 0}, "block"), ({"start_hour": 24.0}, "start_hour"), ({"upload_share": 0.0}, "upload_share")],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        VirtualClock(**settings)  # type: ignore[arg-type]


class TestWithDevicesThatAreAlwaysThere(TransportPromises):
    make = staticmethod(lambda: VirtualClock(devices=DeviceSettings(hours=24.0), block=7))
