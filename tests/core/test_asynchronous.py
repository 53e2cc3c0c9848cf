"""Asynchronous rounds by hand: w and a row of a table, which clients pull halfway towards numbers of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.asynchronous import Buffer, run_async, run_version
from fedtower.core.checking import Reason
from fedtower.core.client import ClientSide
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks, hookimpl
from fedtower.core.plan import LocalSettings, Plan, RowSettings
from fedtower.core.round import Parts
from fedtower.core.rows import RowIds
from fedtower.core.runtime import Work, as_updates
from fedtower.core.server import Schedule, ServerState
from fedtower.core.staleness import AsynchronousSettings, discounted
from fedtower.core.store import ClientStore
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.transport import Abandoned, Asked
from fedtower.core.updates import Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.server_optimizers.sgd import SGD
from fedtower.plugins.transports.in_process import InProcess

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Arrival = tuple[int, int]  # a client, and the version that it was sent

TARGETS = np.array([8.0, 4.0, -4.0, 16.0, 2.0])


class Data:
    def work(self, plan: Plan, clients: IntArray) -> Work:
        ones = np.ones(len(clients), dtype=np.int64)
        rows = RowIds(np.arange(len(clients) + 1, dtype=np.int64), 0 * clients)
        return Work(clients, ones, ones, {}, row_ids={"item": rows})


class Halfway:
    """The client goes half of the way to its target, with w and with its row."""

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        targets: FloatArray = TARGETS[work.clients].astype(np.float32)
        w = np.float32(0.5) * (plan.parameters["w"] + targets)
        rows = np.float32(0.5) * (work.rows["item"] + targets[:, None])
        return as_updates(plan, work, {"w": w}, {"item": rows}, np.zeros(len(work))), {}


class Table:
    def __init__(self) -> None:
        self.row = np.zeros((1, 1), dtype=np.float32)
        self.generation = 0

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        return self.row[ids]

    def apply(self, deltas: Mapping[str, tuple[IntArray, FloatArray]], lr_scale: float) -> None:
        self.row = self.row + deltas["item"][1]
        self.generation += 1

    def snapshot(self) -> Mapping[str, NDArray[Any]]:
        return {"row": self.row}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.row = arrays["row"]


@dataclass
class Scripted:
    """Says itself who arrives in each version, and who is on the way when it ends."""

    script: Sequence[Sequence[Arrival]]
    on_the_way: Sequence[Sequence[Arrival]] = ()
    width: int = 1
    asked: list[tuple[list[int], int]] = field(default_factory=list)

    def version(self, plan: Plan, cohort: Cohort, asked: Asked) -> ScriptedVersion:
        return ScriptedVersion(self, plan.round, cohort, asked)

    def exchange(self, *_: Any) -> Iterator[Updates]:
        raise AssertionError("these rounds wait for nobody")


@dataclass
class ScriptedVersion:
    of: Scripted
    version: int
    cohort: Cohort
    ask: Asked

    def arrivals(self) -> Iterator[Updates]:
        for client, version in self.of.script[self.version - 1]:
            self.of.asked.append((self.cohort.clients.tolist(), self.ask.needed()))
            if not self.ask.needed():
                return
            in_use = 0 <= self.version - version <= self.ask.settings.max_staleness
            block = self.ask.visit(version if in_use else self.version, np.array([client]))
            yield replace(block, rounds=np.array([version]))
        if self.ask.needed():
            raise Abandoned("nobody else comes")

    def spent(self, counted: Cohort) -> None:
        pass

    def flight(self) -> Mapping[str, NDArray[Any]]:
        if not self.of.on_the_way:
            return {}
        flight = np.array(self.of.on_the_way[self.version - 1], dtype=np.int64).reshape(-1, 2)
        return {"clients": flight[:, 0], "versions": flight[:, 1]}


def parts(transport: Any, plugin: object = None, *, rounds: int = 3, **settings: Any) -> Parts:
    hooks, draws, store, table = Hooks.none(pytest.fail), Draws(1), ClientStore(5), Table()
    if plugin is not None:
        hooks.add(plugin, "plugin")
    return Parts(
        population=5,
        rounds=rounds,
        sampler=Everybody(),
        transport=transport,
        client=ClientSide(Data(), Halfway(), table, (), store, hooks, draws),
        transforms=(),
        aggregator=FedAvg(),
        optimizer=SGD(),
        store=table,
        local=LocalSettings(steps=1),
        rows=RowSettings(),
        lr=1.0,
        schedule=Schedule("none", 1.0, rounds),
        hooks=hooks,
        draws=draws,
        clock=lambda: 0.0,
        asynchronous=AsynchronousSettings(**{"buffer": 2, "concurrency": 3, **settings}),
    )


class Everybody:
    def sample(self, round: int, population: int, draws: Draws) -> Cohort:
        return Cohort(round, np.arange(population), population)


def start() -> ServerState:
    return ServerState(0, {"w": np.zeros((), dtype=np.float32)})


def trained(made: Parts) -> tuple[list[float], list[float], list[Any]]:
    """w and the row after each version, and the reports."""
    w, row, reports = [], [], []
    for state, report in run_async(start(), made):
        assert isinstance(made.store, Table)
        w.append(float(state.parameters["w"]))
        row.append(float(made.store.row[0, 0]))
        reports.append(report)
    return w, row, reports


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [1, 2**-0.5, 3**-0.5, 0.5, 9**-0.5]),
        ({"exponent": 2.0}, [1, 1 / 4, 1 / 9, 1 / 16, 1 / 81]),
        ({"staleness": "constant"}, [1, 1, 1, 1, 1]),
        ({"staleness": "hinge", "grace": 2, "slope": 10.0}, [1, 1, 1, 1 / 11, 1 / 61]),
    ],
)
def test_what_stale_updates_count(settings: dict[str, Any], factors: list[float]) -> None:
    made = AsynchronousSettings(buffer=1, concurrency=1, **settings)
    np.testing.assert_allclose(made.factors(np.array([0, 1, 2, 3, 8])), factors, rtol=1e-12)


def test_deltas_are_discounted_and_weights_are_not() -> None:
    block = examples.updates(3)
    factors = np.array([1.0, 0.5, 0.25])
    got = discounted(block, factors)
    assert got.weights.tolist() == block.weights.tolist()
    for name, delta in block.dense.items():
        for client, factor in enumerate(factors):
            assert_same_bits(got.dense[name][client], delta[client] * np.float32(factor))
    rows, before = got.rows["item"], block.rows["item"]
    assert_same_bits(rows.row_deltas, before.row_deltas * factors.astype(np.float32)[before.owners][:, None])


# By hand, with 1 / (1 + staleness): a client's delta is (target - w it was sent) / 2, and a step their sum over two.
#   version 1: clients 0 and 1 from w = 0: (4 + 2) / 2                                            w = 3
#   version 2: client 2 from version 1: -4/2 * 1/2 = -1; client 3 from 2: (16 - 3)/2 = 6.5        w = 3 + 5.5/2 = 5.75
#   version 3: client 1 from version 1: 4/2 * 1/3;       client 0 from 3: (8 - 5.75)/2 = 1.125    w = 5.75 + 1.7917/2
SCRIPT = [[(0, 1), (1, 1)], [(2, 1), (3, 2)], [(1, 1), (0, 3)]]
ON_THE_WAY = [[(2, 1), (1, 1)], [(1, 1)], []]
WANTED = [3.0, 5.75, 5.75 + (2 / 3 + 1.125) / 2]


def test_three_versions_by_hand() -> None:
    made = parts(Scripted(SCRIPT, ON_THE_WAY), exponent=1.0)
    w, row, reports = trained(made)
    assert w == pytest.approx(WANTED, rel=1e-6)
    assert row == pytest.approx(WANTED, rel=1e-6), "rows too are those that a client was sent"
    assert [report.staleness for report in reports] == [
        {"mean": 0, "max": 0},
        {"mean": 0.5, "max": 1},
        {"mean": 1, "max": 2},
    ]
    assert [(report.clients, report.dropped, report.bytes_down) for report in reports] == [(2, 0, 16)] * 3


def test_what_a_client_was_sent_is_kept_until_nobody_works_from_it() -> None:
    made, state, held = parts(Scripted(SCRIPT, ON_THE_WAY)), start(), []
    for _ in range(3):
        state, _ = run_version(state, made)
        held.append(sorted(name for name in state.transport if name.startswith("kept")))
    first = ["kept/1/parameters/w", "kept/1/rows/item/ids", "kept/1/rows/item/values"]
    assert held == [first, first, []]


def test_it_goes_on_from_any_version_with_the_same_bits() -> None:
    whole, cut = parts(Scripted(SCRIPT, ON_THE_WAY)), parts(Scripted(SCRIPT, ON_THE_WAY))
    *_, (wanted, _) = run_async(start(), whole)
    state, _ = run_version(start(), cut)
    other = parts(Scripted(SCRIPT, ON_THE_WAY))
    assert isinstance(other.store, Table)
    assert isinstance(cut.store, Table)
    other.store.row = cut.store.row
    *_, (got, _) = run_async(
        replace(state, transport={name: value.copy() for name, value in state.transport.items()}), other
    )
    assert_same_bits(got.parameters, wanted.parameters)


def test_one_update_a_step_and_none_stale_is_gradient_descent_by_one_client_after_the_other() -> None:
    script = [[(client, version)] for version, client in enumerate([3, 0, 3, 2], start=1)]
    w, _, _ = trained(parts(Scripted(script), rounds=4, buffer=1, concurrency=1))
    wanted, at = [], 0.0
    for client in (3, 0, 3, 2):
        at += (TARGETS[client] - at) / 2
        wanted.append(at)
    assert w == wanted


class Told:
    def __init__(self) -> None:
        self.refused: list[tuple[int, int, str]] = []
        self.warned_of: list[str] = []

    @hookimpl
    def update_refused(self, round: int, client: int, reason: str, words: str) -> None:
        assert len(words) > 20
        self.refused.append((round, client, reason))

    @hookimpl
    def warned(self, message: str) -> None:
        self.warned_of.append(message)


def test_what_is_too_stale_is_refused_and_the_step_waits_for_another() -> None:
    told = Told()
    script = [[(0, 1), (1, 1)], [(2, 2), (3, 2)], [(4, 1), (0, 2), (1, 3)]]
    flights = [[(4, 1)], [(4, 1), (0, 2)], []]
    *_, report = trained(parts(Scripted(script, flights), told, max_staleness=1))[2]
    assert told.refused == [(3, 4, "stale")]
    assert report.refused == {"stale": 1}
    assert (report.clients, report.dropped, report.staleness) == (2, 1, {"mean": 0.5, "max": 1})


def test_what_is_of_a_version_to_come_is_refused() -> None:
    told = Told()
    trained(parts(Scripted([[(0, 2), (1, 1), (2, 1)]]), told, rounds=1))
    assert told.refused == [(1, 0, "other_round")]


def test_no_more_is_taken_than_is_needed() -> None:
    transport = Scripted([[(0, 1), (1, 1), (2, 1), (3, 1)]])
    *_, report = trained(parts(transport, rounds=1))[2]
    assert report.clients == 2
    assert transport.asked == [(list(range(5)), 2), (list(range(5)), 1), (list(range(5)), 0)]


def test_a_version_that_nobody_comes_to_changes_nothing_and_the_next_goes_on() -> None:
    told = Told()
    w, _, reports = trained(parts(Scripted([[(0, 1)], [(0, 2), (1, 2)]]), told, rounds=2))
    assert w == [0.0, 3.0]
    assert (reports[0].clients, reports[0].staleness) == (0, {})
    assert "version 1 was abandoned: nobody else comes" in told.warned_of[0]


def test_a_transport_that_waits_for_cohorts_is_refused() -> None:
    with pytest.raises(RecipeError, match="transport that has them"):
        run_version(start(), parts(InProcess()))


def test_who_comes_is_of_the_cohort_however_large_its_number() -> None:
    tally = Buffer(1, population=2)
    tally.refuse(np.array([9]), Reason.NORM)
    block = replace(examples.updates(2), clients=np.array([40, 3]), rounds=np.array([1, 0]))
    assert list(tally.count([block])) == [block]
    assert tally.has(np.array([3, 9, 40])).tolist() == [True, False, True]
    assert tally.survivors().clients.tolist() == [3, 40]
    assert tally.survivors().population == 41
    assert (len(tally), tally.report(1, 1, 0.0).dropped) == (2, 1)


@pytest.mark.parametrize(
    ("setting", "value"), [("buffer", 0), ("concurrency", 0), ("max_staleness", -1), ("exponent", -0.5), ("grace", -1)]
)
def test_settings_that_make_no_sense_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"asynchronous.{setting}"):
        AsynchronousSettings(**{"buffer": 1, "concurrency": 1, setting: value})
