"""Rounds that end by a deadline or with enough updates: what counts, what is said, and what is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort
from fedtower.core.deadline import ARRIVED, Arrivals, Listening, State
from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.round import Parts, RoundReport, run_round, run_rounds
from fedtower.core.runtime import Work, as_updates
from fedtower.core.server import Schedule, ServerState
from fedtower.core.store import ClientStore
from fedtower.core.transport import Abandoned, DeviceTime, Visit
from fedtower.core.updates import Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.server_optimizers.sgd import SGD
from fedtower.plugins.transports.in_process import InProcess

IntArray = NDArray[np.int64]


class Data:
    def work(self, plan: Plan, clients: IntArray) -> Work:
        ones = np.ones(len(clients), dtype=np.int64)
        return Work(clients, ones, ones, {})


class Numbering:
    """Everybody's delta is its number."""

    def train(self, plan: Plan, work: Work) -> tuple[Updates, dict[str, Any]]:
        moved = plan.parameters["w"] + work.clients.astype(np.float32)
        return as_updates(plan, work, {"w": moved}, {}, np.ones(len(work))), {}


@dataclass(frozen=True)
class Everybody:
    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        return Cohort(round, np.arange(population), population)


@dataclass
class Learning:
    """Learns nothing, and remembers what it was shown; it allows one second more after every round."""

    shown: list[Arrivals] = field(default_factory=list)

    def init(self) -> State:
        return {"seconds": np.array(5.0)}

    def limit(self, state: State) -> float:
        return float(state["seconds"])

    def learn(self, state: State, arrivals: Arrivals) -> tuple[State, str]:
        self.shown.append(arrivals)
        return {"seconds": state["seconds"] + 1.0}, "one more"


@dataclass
class Slow:
    """One client a block, client c after c seconds of a clock of its own."""

    seconds: float = 0.0
    deadlines: list[float | None] = field(default_factory=list)

    def now(self) -> float:
        return self.seconds

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        self.deadlines.append(deadline)
        started = self.seconds
        for client in cohort.clients:
            self.seconds = started + float(client)
            yield visit(plan, np.array([client]))


class Notes:
    def __init__(self, deadline: float | None = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.deadline = deadline

    @hookimpl
    def round_deadline(self, round: int) -> float | None:
        return self.deadline

    @hookimpl
    def deadline_changed(self, round: int, seconds: float, why: str) -> None:
        self.told.append(("deadline", round, seconds, why))

    @hookimpl
    def client_dropped(self, clients: IntArray, reason: str) -> None:
        self.told.append(("dropped", clients.tolist(), reason))

    @hookimpl
    def update_refused(self, client: int, reason: str) -> None:
        self.told.append(("refused", client, reason))

    @hookimpl
    def accept_update(self, update: Updates) -> str | None:
        assert update.clients is not None
        return "it is the first" if update.clients[0] == 0 and self.deadline is None else None


def parts(notes: object = None, **others: Any) -> Parts:
    hooks, draws = Hooks.none(pytest.fail), Draws(1)
    if notes is not None:
        hooks.add(notes, "notes")
    side = ClientSide(Data(), Numbering(), None, [], ClientStore(8), hooks, draws)
    made = Parts(
        population=8,
        rounds=3,
        sampler=Everybody(),
        transport=InProcess(block=3),
        client=side,
        transforms=[],
        aggregator=FedAvg(),
        optimizer=SGD(),
        store=None,
        local=LocalSettings(steps=1),
        rows=RowSettings(),
        lr=1.0,
        schedule=Schedule("none", 1.0, 3),
        hooks=hooks,
        draws=draws,
        clock=lambda: 0.0,
    )
    return replace(made, **others)


def start() -> ServerState:
    return ServerState(0, {"w": np.zeros((), dtype=np.float32)})


def one_round(made: Parts, state: ServerState | None = None) -> tuple[ServerState, RoundReport]:
    return run_round(state or start(), made)


def slow(**others: Any) -> dict[str, Any]:
    transport = Slow()
    return {"transport": transport, "clock": transport.now, **others}


def test_the_deadline_of_the_recipe_ends_a_round() -> None:
    state, report = one_round(parts(**slow(deadline=Learning())))
    assert (report.clients, report.dropped) == (5, 3)  # 0 to 4; the sixth would come at the deadline
    assert float(state.parameters["w"]) == np.mean([0, 1, 2, 3, 4])


def test_a_plugin_decides_first() -> None:
    made = parts(Notes(deadline=3.0), **slow(deadline=Learning()))
    _, report = one_round(made)
    assert report.clients == 3
    assert isinstance(made.transport, Slow)
    assert made.transport.deadlines == [3.0]


def test_a_deadline_sees_when_updates_came_and_who_did_not() -> None:
    deadline = Learning()
    one_round(parts(**slow(deadline=deadline)))
    (arrivals,) = deadline.shown
    assert arrivals.seconds.tolist() == [0, 1, 2, 3, 4]
    assert (arrivals.asked, arrivals.target, arrivals.deadline, arrivals.ended) == (8, 8, 5.0, 5.0)
    assert arrivals.when(5) == 4.0
    assert arrivals.when(6) == float("inf")


def test_a_change_is_said_once_and_holds_from_the_next_round_on() -> None:
    notes = Notes()
    made = parts(notes, **slow(deadline=Learning()))
    limits = [float(state.deadline["seconds"]) for state, _ in run_rounds(start(), made)]
    assert limits == [6.0, 7.0, 8.0]
    assert [each for each in notes.told if each[0] == "deadline"] == [
        ("deadline", round, seconds, "one more") for round, seconds in ((1, 6.0), (2, 7.0), (3, 8.0))
    ]
    assert isinstance(made.transport, Slow)
    assert made.transport.deadlines == [5.0, 6.0, 7.0]


def test_without_a_deadline_nothing_is_learnt() -> None:
    state, report = one_round(parts(**slow()))
    assert (report.clients, dict(state.deadline)) == (8, {})


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_a_round_ends_with_its_target_and_nobody_else_is_trained(block: int) -> None:
    notes = Notes(deadline=1e9)
    visited: list[int] = []
    made = parts(notes, transport=InProcess(block=block), target=5)
    visit = made.client.visit

    def noting(plan: Plan, clients: IntArray) -> Updates:
        visited.extend(clients.tolist())
        return visit(plan, clients)

    object.__setattr__(made.client, "visit", noting)
    state, report = one_round(made)
    assert (report.clients, report.dropped, len(visited)) == (5, 3, 5)
    assert float(state.parameters["w"]) == pytest.approx(np.mean(visited))
    ((_, dropped, why),) = notes.told
    assert sorted([*dropped, *visited]) == list(range(8))
    assert why == "the round had the updates that it needed before theirs came"


def test_who_is_first_is_drawn_anew_each_round() -> None:
    made = parts(target=3)
    first, report = one_round(made)
    second, _ = one_round(made, first)
    again, _ = one_round(parts(target=3))
    assert float(first.parameters["w"]) == float(again.parameters["w"])
    assert float(second.parameters["w"]) != 2 * float(first.parameters["w"])
    assert report.clients == 3


def test_who_is_refused_is_made_up_for() -> None:
    notes = Notes()
    _, report = one_round(parts(notes, **slow(target=3)))
    assert report.clients == 3  # 1, 2 and 3: a plugin refused 0
    assert dict(report.refused) == {"plugin": 1}


def test_what_comes_beyond_the_target_in_one_block_is_refused_as_surplus() -> None:
    @dataclass(frozen=True)
    class AllAtOnce:
        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            yield visit(plan, cohort.clients)

    notes = Notes(deadline=1e9)
    state, report = one_round(parts(notes, transport=AllAtOnce(), target=6))
    assert (report.clients, dict(report.refused)) == (6, {"surplus": 2})
    assert float(state.parameters["w"]) == np.mean(range(6))
    assert [told for told in notes.told if told[0] == "refused"] == [
        ("refused", 6, "surplus"),
        ("refused", 7, "surplus"),
    ]


def test_what_was_acknowledged_counts_beyond_the_target() -> None:
    @dataclass(frozen=True)
    class Acknowledging(InProcess):
        keeps_time: ClassVar[bool] = True

        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            yield visit(plan, cohort.clients)

    _, report = one_round(parts(transport=Acknowledging(), target=6))
    assert (report.clients, dict(report.refused)) == (8, {})


def test_an_abandoned_round_teaches_too() -> None:
    @dataclass(frozen=True)
    class TooFew(InProcess):
        keeps_time: ClassVar[bool] = True

        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            block = visit(plan, cohort.clients[:2])
            yield replace(block, metrics={**block.metrics, ARRIVED: np.array([2.0, np.nan])})
            raise Abandoned("there were 2 of 8")

    class Told(Notes):
        @hookimpl
        def warned(self, message: str) -> None:
            self.told.append(("warned", message))

    deadline = Learning()
    _, report = one_round(parts(Told(deadline=4.0), transport=TooFew(), deadline=deadline))
    (arrivals,) = deadline.shown
    assert (report.clients, arrivals.seconds.tolist(), arrivals.unknown) == (0, [2.0], 1)


def test_when_an_update_came_goes_no_further_than_the_deadline() -> None:
    listening = Listening(Cohort(1, np.arange(2), 2))
    block = Updates(np.ones(2), clients=np.arange(2), metrics={"loss": np.ones(2), ARRIVED: np.array([3.0, 1.0])})
    (out,) = listening.noted([block])
    assert set(out.metrics) == {"loss"}
    assert listening.heard(9.0, None).seconds.tolist() == [1.0, 3.0]


def test_a_transport_with_a_time_of_its_own_is_begun_and_asked() -> None:
    class OwnTime(Slow):
        def begin(self, state: State) -> None:
            self.seconds = float(state.get("now", np.array(100.0)))

        def state(self) -> State:
            return {"now": np.array(self.seconds)}

        def spent(self, counted: Cohort) -> DeviceTime:
            return DeviceTime(28.0, 28.0 - counted.clients.sum(), 1)

    transport = OwnTime()
    made = parts(transport=transport, clock=transport.now, target=4)
    state, report = one_round(made)
    assert float(state.transport["now"]) == 103.0
    assert (report.seconds, report.device_seconds, report.wasted_seconds, report.late) == (3.0, 28.0, 22.0, 1)
    transport.seconds = 0.0  # a process that begins anew
    state, _ = one_round(made, state)
    assert float(state.transport["now"]) == 106.0
