"""A whole round with small real parts, by hand and by law."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.accounting import Ledger
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import PluginError
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import Plan, RowSettings
from fedtower.core.round import run_round, run_rounds
from fedtower.core.server import Schedule
from fedtower.core.tally import Tally
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.transport import Visit
from fedtower.core.updates import Updates
from fedtower.plugins.aggregators.fedavg import FedAvg
from fedtower.plugins.server_optimizers.sgd import SGD
from fedtower.plugins.transforms.clip import Clip
from fedtower.plugins.transports.in_process import InProcess
from tests.core.small_round import (
    LOSS_1,
    W_1,
    Clock,
    Deadline,
    HalfNow,
    IntArray,
    Notes,
    Numbering,
    Table,
    outcome,
    parts,
    rows_of,
    start,
    w_of,
)


def test_one_round_by_hand() -> None:
    state, rows, report = outcome(parts(0, 1))
    assert state.round == 1
    assert w_of(state) == pytest.approx(W_1, rel=1e-6)
    assert rows == pytest.approx([0.25, (2 * 0.5 + 1 * 2) / 3, 0, 0], rel=1e-6)
    assert state.generation == 1
    assert report.loss == pytest.approx(LOSS_1, rel=1e-6)
    assert (report.round, report.total_rounds, report.clients, report.dropped) == (1, 3, 2, 0)


def test_a_second_round_goes_on_from_the_first() -> None:
    made = parts(1)
    state, rows, _ = outcome(made, rounds=2)
    # Client 1 alone: w = 4 and r[1] = 2 after the first round, so it is 4 * 2 + 2 - 4 = 6 too high.
    assert w_of(state) == 4 - 0.5 * 6 * 2
    assert rows == [0, 2 - 0.5 * 6, 0, 0]
    assert state.generation == 2


def test_rows_can_be_averaged_over_the_whole_cohort() -> None:
    _, rows, _ = outcome(parts(0, 1, rows=RowSettings(average="cohort")))
    assert rows == pytest.approx([0.25 * 2 / 3, (2 * 0.5 + 1 * 2) / 3, 0, 0], rel=1e-6)


def test_frozen_rows_are_fetched_and_stay() -> None:
    made = parts(0, 1, rows=RowSettings(train="frozen"))
    state, rows, report = outcome(made)
    assert w_of(state) == pytest.approx(W_1, rel=1e-6)
    assert rows == [0, 0, 0, 0]
    assert state.generation == 0
    assert report.bytes_up == 2 * (4 + 8)
    assert report.bytes_down == 2 * 4 + 3 * 4


def test_server_rates_scale_the_step_of_parameters_and_rows() -> None:
    made = parts(1, lr=0.5, schedule=Schedule("linear", to=0.5, rounds=3))
    state = replace(start(made), round=2)  # the third and last round: half of the rates are left
    state, _ = run_round(state, made)
    assert w_of(state) == 0.5 * 0.5 * 4
    assert rows_of(made) == [0, 0.5 * 2, 0, 0]


def test_bytes_are_counted_as_documented() -> None:
    _, _, report = outcome(parts(0, 1))
    # Up: w (4) and the weight (8); of rows their number (4), and for each its id (4) and its delta (4).
    assert report.bytes_up == (4 + 8 + 4 + 2 * 8) + (4 + 8 + 4 + 1 * 8)
    # Down: w (4), and each row asked for (4).
    assert report.bytes_down == (4 + 2 * 4) + (4 + 1 * 4)


def test_examples_are_those_of_the_clients_that_count() -> None:
    class Objection:
        @hookimpl
        def accept_update(self, update: Updates, plan: Plan) -> str | None:
            return "not this one" if update.clients is not None and 4 in update.clients else None

    assert outcome(parts(0, 1, 2, 4))[2].examples == 2 + 1 + 0 + 4
    assert outcome(parts(0, 1, 2, 4, plugin=Objection()))[2].examples == 2 + 1 + 0


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_the_width_of_blocks_changes_no_bit_of_state_or_report(block: int) -> None:
    wide, narrow = (parts(*range(8), transforms=[Clip(norm=0.7)], transport=InProcess(block=b)) for b in (8, block))
    assert_same_bits(outcome(narrow, rounds=3), outcome(wide, rounds=3))
    assert outcome(wide)[2].metrics["clipped"] > 0


@dataclass(frozen=True)
class Backwards:
    """The last of the cohort answers first, and everyone alone."""

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        for client in cohort.clients[::-1]:
            yield visit(plan, np.array([client]))


def test_the_order_of_arrival_changes_no_bit_of_state_or_report() -> None:
    one, other = parts(*range(8), transport=InProcess()), parts(*range(8), transport=Backwards())
    assert_same_bits(outcome(one, rounds=3), outcome(other, rounds=3))


class Silence:
    """Nobody answers."""

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        return iter(())


@pytest.mark.parametrize("clients", [(0, 1), ()], ids=["silence", "an empty cohort"])
def test_a_round_in_which_nobody_answers_changes_nothing_but_its_number(clients: tuple[int, ...]) -> None:
    notes = Notes()
    made = parts(*clients, plugin=notes, transport=Silence(), optimizer=SGD(momentum=0.9), aggregator=Numbering())
    before = replace(start(made), optimizer={"w": np.ones((), dtype=np.float32)}, generation=4)
    after, report = run_round(before, made)
    assert after == replace(before, round=1)
    assert rows_of(made) == [0, 0, 0, 0]
    assert (report.clients, report.dropped, report.bytes_up, report.bytes_down) == (0, len(clients), 0, 0)
    assert math.isnan(report.loss)
    lost = [("dropped", 1, list(clients), "sent no update in time")] if clients else []
    assert notes.told == [("started", 1, list(clients)), *lost, ("finished", 1, 0)]


def test_clients_without_examples_are_heard_and_move_nothing() -> None:
    made = parts(2, optimizer=SGD(momentum=0.9))
    before = start(made)
    after, report = run_round(before, made)
    assert after == replace(before, round=1)
    assert (report.clients, report.dropped) == (1, 0)
    assert math.isnan(report.loss)


def test_clients_without_examples_change_neither_the_step_nor_the_loss() -> None:
    with_one, without = outcome(parts(0, 1, 2)), outcome(parts(0, 1))
    assert_same_bits(with_one[:2], without[:2])
    assert with_one[2].loss == without[2].loss
    assert with_one[2].clients == 3


def test_who_drops_out_might_as_well_not_have_been_chosen() -> None:
    notes = Notes()
    made = parts(*range(8), plugin=notes, transport=InProcess(dropout=0.5))
    state, rows, report = outcome(made)
    ((_, _, lost, _),) = [told for told in notes.told if told[0] == "dropped"]
    assert 0 < len(lost) < 8
    left = tuple(client for client in range(8) if client not in lost)
    assert (report.clients, report.dropped) == (len(left), len(lost))
    assert_same_bits((state, rows), outcome(parts(*left))[:2])


def test_what_comes_after_the_deadline_is_dropped() -> None:
    clock = Clock()
    plugin = Deadline(clock)
    made = parts(0, 1, 3, 4, 5, plugin=plugin, transport=InProcess(block=1), clock=clock)
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 1))[:2])
    assert (report.clients, report.dropped) == (2, 3)
    assert report.seconds == 3, "the third is waited for, and nobody after it"
    assert plugin.told[-2:] == [("dropped", 1, [3, 4, 5], "sent no update in time"), ("finished", 1, 2)]


def test_exactly_at_the_deadline_is_too_late() -> None:
    clock = Clock()

    class Sharp(Deadline):
        @hookimpl
        def round_deadline(self, round: int) -> float:
            return 2.0

    made = parts(0, 1, plugin=Sharp(clock), transport=InProcess(block=1), clock=clock)
    assert outcome(made)[2].clients == 1


def test_rounds_go_on_until_all_are_done() -> None:
    made = parts(0, 1)
    assert [report.round for _, report in run_rounds(start(made), made)] == [1, 2, 3]


def test_a_run_that_goes_on_is_equal_to_one_that_never_stopped() -> None:
    whole, cut, rest = (parts(*range(8), optimizer=SGD(momentum=0.9)) for _ in range(3))
    *_, (wanted, _) = run_rounds(start(whole), whole)
    state, _ = next(run_rounds(start(cut), cut))
    assert isinstance(cut.store, Table)
    assert rest.store is not None
    rest.store.restore(cut.store.snapshot())
    *_, (got, report) = run_rounds(state, rest)
    assert report.round == 3
    assert_same_bits((got, rows_of(rest)), (wanted, rows_of(whole)))


@dataclass(frozen=True)
class Counting:
    """A ledger of how many rounds there were, and of those who counted; a budget of rounds."""

    budget: int

    def record(self, ledger: Ledger, cohort: Cohort, transforms: Any) -> Ledger:
        assert len(transforms) == 1
        rounds = int(ledger["rounds"]) if ledger else 0
        return {"rounds": np.asarray(rounds + 1), "clients": cohort.clients}

    def affords(self, ledger: Ledger, transforms: Any) -> bool:
        return not ledger or int(ledger["rounds"]) < self.budget

    def spent(self, ledger: Ledger) -> Mapping[str, float]:
        return {"rounds": float(ledger["rounds"])}


def test_a_run_ends_when_another_round_cannot_be_afforded() -> None:
    told: list[tuple[int, Mapping[str, float]]] = []
    said: list[str] = []

    class Watching:
        @hookimpl
        def privacy_spent(self, round: int, spent: Mapping[str, float]) -> None:
            told.append((round, spent))

        @hookimpl
        def warned(self, message: str) -> None:
            said.append(message)

    made = parts(0, 1, 3, plugin=Watching(), transforms=[HalfNow()], accountant=Counting(budget=2))
    states = [state for state, _ in run_rounds(start(made), made)]
    assert [int(state.accountant["rounds"]) for state in states] == [1, 2]
    assert states[-1].accountant["clients"].tolist() == [0, 1, 3]
    assert told == [(1, {"rounds": 1.0}), (2, {"rounds": 2.0})]
    assert said == ["stopped after round 2 of 3: another would cost too much (rounds 2)"]
    assert list(run_rounds(states[-1], made)) == [], "a resumed run goes on with its ledger"


def test_a_round_in_which_nobody_answers_is_recorded_too() -> None:
    made = parts(0, transport=Silence(), transforms=[HalfNow()], accountant=Counting(budget=2))
    state, _ = run_round(start(made), made)
    assert int(state.accountant["rounds"]) == 1
    assert state.accountant["clients"].tolist() == []


def test_an_aggregator_gets_its_state_back() -> None:
    state, _, _ = outcome(parts(0, 1, aggregator=Numbering()), rounds=3)
    assert int(state.aggregator["folded"]) == 3


@pytest.mark.parametrize(("part", "lost"), [("dense", "w"), ("rows", "rows of item")])
def test_an_aggregator_that_loses_what_it_is_given_ends_the_run(part: str, lost: str) -> None:
    class Forgetful(FedAvg):
        def fold(
            self, blocks: Iterable[Updates], state: Mapping[str, NDArray[Any]]
        ) -> tuple[Updates, Mapping[str, NDArray[Any]]]:
            total, memory = super().fold(blocks, state)
            return replace(total, dense={}) if part == "dense" else replace(total, rows={}), memory

    with pytest.raises(PluginError, match=f"the aggregator Forgetful was given {lost} and gives a total without"):
        outcome(parts(0, 1, aggregator=Forgetful()))


@pytest.mark.parametrize("order", [(2, 0), (0, 2)], ids=["first", "last"])
def test_a_client_without_weight_is_folded_wherever_it_stands(order: tuple[int, ...]) -> None:
    class InThisOrder:
        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            return (visit(plan, np.array([client])) for client in order)

    state, _, _ = outcome(parts(0, 2, aggregator=Numbering(), transport=InThisOrder()))
    assert int(state.aggregator["seen"]) == 2


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_mean_is_rounded_once_whatever_the_order(order: tuple[int, ...]) -> None:
    losses, tally = [1e16, 1.0, -1e16], Tally(Cohort(1, np.arange(3), 3))
    blocks = (Updates(np.ones(1), clients=np.array([c]), metrics={"loss": np.array([losses[c]])}) for c in order)
    assert len(list(tally.count(blocks))) == 3
    assert tally.report(1, 1, seconds=0.0).loss == 1 / 3


def test_a_metric_that_only_some_clients_send_is_their_mean() -> None:
    class Extra:
        @hookimpl(wrapper=True)
        def client_train(self, clients: IntArray) -> Generator[None, Any, Any]:
            updates, states = yield
            extra = {"depth": np.array([3.0])} if clients[0] == 1 else {}
            return replace(updates, metrics={**updates.metrics, **extra}), states

    report = outcome(parts(0, 1, plugin=Extra(), transport=InProcess(block=1)))[2]
    assert report.metrics == {"steps": 1.0, "depth": 3.0}
    assert report.loss == pytest.approx(LOSS_1, rel=1e-6)


def test_seconds_are_the_clock_s() -> None:
    clock = Clock()

    class Slow:
        @hookimpl(wrapper=True)
        def aggregate(self) -> Generator[None, Any, Any]:
            result = yield
            clock.seconds += 2.5
            return result

    assert outcome(parts(0, plugin=Slow(), clock=clock))[2].seconds == 2.5
