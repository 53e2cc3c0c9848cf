"""Hooks of plugins in a round: they decide, wrap and observe."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import FedtowerError
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import Plan
from fedtower.core.round import RoundReport, run_rounds
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.transport import Visit
from fedtower.core.updates import Updates
from tests.core.small_round import W_1, Clock, Deadline, IntArray, Notes, outcome, parts, start, w_of


def test_observers_are_told_in_order() -> None:
    notes = Notes()
    outcome(parts(0, 1, 3, plugin=notes), rounds=2)
    assert notes.told == [
        told
        for round in (1, 2)
        for told in (
            ("started", round, [0, 1, 3]),
            ("received", round, [0, 1]),
            ("received", round, [3]),
            ("finished", round, 3),
        )
    ]


def test_an_observer_that_fails_changes_nothing() -> None:
    class Failing(Notes):
        @hookimpl
        def update_received(self, round: int, updates: Updates) -> None:
            raise RuntimeError("no disk left to write it down on")

    failing, said = Failing(), list[str]()
    made = parts(0, 1, plugin=failing)
    made.hooks.report = said.append
    assert_same_bits(outcome(made, rounds=2), outcome(parts(0, 1), rounds=2))
    assert len(said) == 1
    assert failing.told[-1] == ("finished", 2, 2)


def test_the_transport_is_told_the_deadline() -> None:
    told: list[float | None] = []

    class Hearing:
        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            told.append(deadline)
            return iter(())

    outcome(parts(0, transport=Hearing()))
    outcome(parts(0, transport=Hearing(), plugin=Deadline(Clock())))
    assert told == [None, 2.5]


def test_a_plugin_may_select_the_clients() -> None:
    class Selecting(Notes):
        @hookimpl
        def select_clients(self, round: int, population: int, draws: Draws) -> IntArray:
            assert (round, population, draws) == (1, 8, Draws(1))
            return np.array([1, 0])

    plugin = Selecting()
    assert_same_bits(outcome(parts(5, 6, 7, plugin=plugin)), outcome(parts(0, 1)))
    assert plugin.told[0] == ("started", 1, [0, 1])


def test_a_plugin_may_leave_the_choice_to_the_sampler() -> None:
    class Undecided:
        @hookimpl
        def select_clients(self, round: int) -> None:
            return None

    assert_same_bits(outcome(parts(0, 1, plugin=Undecided())), outcome(parts(0, 1)))


def test_selected_clients_that_do_not_exist_are_refused() -> None:
    class Inventing:
        @hookimpl
        def select_clients(self) -> IntArray:
            return np.array([0, 8])

    with pytest.raises(FedtowerError, match="a plugin's select_clients"):
        outcome(parts(0, plugin=Inventing()))


def test_a_plugin_may_stop_the_run_and_its_reason_is_passed_on() -> None:
    said: list[str] = []

    class Contented:
        @hookimpl
        def stop_run(self, report: RoundReport) -> str | None:
            return "good enough" if report.round == 2 else None

        @hookimpl
        def warned(self, message: str) -> None:
            said.append(message)

    made = parts(0, 1, plugin=Contented())
    assert [state.round for state, _ in run_rounds(start(made), made)] == [1, 2]
    assert said == ["stopped after round 2 of 3: good enough"]


def test_a_wrapper_of_training_passes_on_what_it_returns() -> None:
    class Halving:
        @hookimpl(wrapper=True)
        def client_train(self, clients: IntArray) -> Generator[None, Any, Any]:
            updates, states = yield
            assert updates.clients.tolist() == clients.tolist()
            return replace(updates, dense={"w": updates.dense["w"] / 2}, rows={}), states

    state, rows, _ = outcome(parts(0, 1, plugin=Halving()))
    assert w_of(state) == pytest.approx(W_1 / 2, rel=1e-6)
    assert rows == [0, 0, 0, 0]


def test_a_wrapper_of_the_aggregate_sees_the_total_and_may_replace_it() -> None:
    seen: list[int | float] = []

    class Pinning:
        @hookimpl(wrapper=True)
        def aggregate(self, round: int) -> Generator[None, Any, Any]:
            total, memory = yield
            seen.extend([round, float(total.dense["w"][0])])
            return replace(total, dense={"w": np.full(1, 7, dtype=np.float32)}), memory

    state, _, report = outcome(parts(0, 1, plugin=Pinning()))
    assert seen == pytest.approx([1, W_1], rel=1e-6)
    assert w_of(state) == 7
    assert report.clients == 2


def test_a_wrapper_of_the_aggregate_may_withhold_it() -> None:
    class Withholding:
        @hookimpl(wrapper=True)
        def aggregate(self) -> Generator[None, Any, Any]:
            _, memory = yield
            return None, memory

    made = parts(0, 1, plugin=Withholding())
    state, rows, _ = outcome(made)
    assert (state.round, w_of(state), rows) == (1, 0, [0, 0, 0, 0])
