"""Updates that a round refuses: each for its reason, and none at the cost of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fedtower.core.checking import CheckSettings
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import Plan
from fedtower.core.round import RoundReport, run_round, run_rounds
from fedtower.core.server import ServerState
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.transport import Visit
from fedtower.core.updates import Updates
from fedtower.plugins.transports.in_process import InProcess
from tests.core.small_round import DATA, Choosy, Data, Examples, IntArray, Notes, outcome, parts, start


def test_an_update_that_is_refused_does_not_count_and_the_rest_do() -> None:
    plugin = Choosy()
    state, rows, report = outcome(parts(0, 1, 3, plugin=plugin, transport=InProcess(block=3)))
    assert plugin.asked == [0, 1, 3]
    assert_same_bits((state, rows), outcome(parts(0, 3))[:2])
    assert (report.clients, report.dropped) == (2, 1)
    assert report.bytes_up == outcome(parts(0, 3))[2].bytes_up


def test_a_client_that_was_refused_is_told_so_once() -> None:
    plugin = Choosy()
    outcome(parts(0, 1, plugin=plugin))
    assert [told for told in plugin.told if told[0] == "dropped"] == [("dropped", 1, [1], "refused: w moved by 4.0")]


def test_a_round_whose_updates_are_all_refused_changes_nothing_but_its_number() -> None:
    made = parts(1, plugin=Choosy())
    before = start(made)
    after, report = run_round(before, made)
    assert after == replace(before, round=1)
    assert (report.clients, report.dropped) == (0, 1)


# A client whose data is broken, and one whose numbers are too large for any grid.
POISONED: Mapping[str, list[Examples]] = {
    "nan": [*DATA[:1], [(math.nan, 1.0, 0)], *DATA[2:]],
    "inf": [*DATA[:1], [(math.inf, 1.0, 0)], *DATA[2:]],
    "huge": [*DATA[:1], [(1e9, 1e9, 0)], *DATA[2:]],
}


@pytest.mark.parametrize("kind", POISONED)
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_one_client_s_broken_update_is_refused_and_the_round_goes_on(kind: str, block: int) -> None:
    notes = Notes()
    made = parts(0, 1, 3, plugin=notes, data=Data(POISONED[kind]), transport=InProcess(block=block))
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 3))[:2])
    reason = "too_large" if kind == "huge" else "not_finite"
    assert (report.clients, report.dropped, report.refused) == (2, 1, {reason: 1})
    assert report.bytes_up == outcome(parts(0, 3))[2].bytes_up
    assert math.isfinite(report.loss)
    assert [told[:4] for told in notes.told if told[0] == "refused"] == [("refused", 1, 1, reason)]
    ((_, _, lost, said),) = [told for told in notes.told if told[0] == "dropped"]
    assert lost == [1]
    assert said.startswith("refused: its update is")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_everybody_s_mistake_is_said_and_in_the_end_stops_the_run() -> None:
    said: list[str] = []

    class Listening:
        @hookimpl
        def warned(self, message: str) -> None:
            said.append(message)

    made = parts(1, plugin=Listening(), data=Data(POISONED["nan"]), rounds=9)
    before, after = start(made), list[tuple[ServerState, RoundReport]]()
    with pytest.raises(UpdateError, match=r"rounds 1 to 3 was refused: .* lower local\.lr"):
        after.extend(run_rounds(before, made))
    assert [report.refused for _, report in after] == [{"not_finite": 1}] * 3
    assert [state for state, _ in after] == [replace(before, round=round) for round in (1, 2, 3)]
    assert said[0] == (
        "every update of round 1 was refused, and nothing moved; 1 of them: its update is not finite; if it is "
        "everybody's, lower local.lr"
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_round_in_which_somebody_counts_ends_the_row_of_those_in_vain() -> None:
    class InTurns:
        @hookimpl
        def select_clients(self, round: int) -> IntArray:
            return np.array([0 if round % 3 == 0 else 1])

    made = parts(plugin=InTurns(), data=Data(POISONED["nan"]), rounds=9)
    assert len(list(run_rounds(start(made), made))) == 9


@dataclass(frozen=True)
class Tampering:
    """Every client alone; what client 1 sends is tampered with, and client 1 answers ``times`` times."""

    changed: Any
    times: int = 1

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        for client in cohort.clients:
            update = visit(plan, np.array([client]))
            yield from [self.changed(update)] * self.times if client == 1 else [update]


def rows_with(update: Updates, **changes: Any) -> Updates:
    return replace(update, rows={"item": replace(update.rows["item"], **changes)})


TAMPERED: Mapping[str, tuple[str, Any]] = {
    "another round's": ("other_round", lambda update: replace(update, rounds=update.rounds + 1)),
    "a stranger's": ("not_asked", lambda update: replace(update, clients=np.array([6]))),
    "negative": ("weight", lambda update: replace(update, weights=np.array([-1.0]))),
    "weightless": ("weight", lambda update: replace(update, weights=np.array([math.nan]))),
    "of too many": ("num_examples", lambda update: replace(update, weights=np.array([51.0]))),
    "of another model": ("wrong_names", lambda update: replace(update, dense={"v": update.dense["w"]})),
    "too little": ("wrong_names", lambda update: replace(update, dense={})),
    "of another table": ("wrong_names", lambda update: replace(update, rows={"user": update.rows["item"]})),
    "of another shape": ("wrong_shape", lambda update: replace(update, dense={"w": np.zeros((1, 2), np.float32)})),
    "too wide": ("wrong_shape", lambda update: rows_with(update, row_deltas=np.zeros((1, 2), np.float32))),
    "of doubles": ("wrong_dtype", lambda update: replace(update, dense={"w": np.zeros(1)})),
    "a row of others": ("row_not_leased", lambda update: rows_with(update, row_ids=np.array([3]))),
    "a row of nobody": ("row_not_leased", lambda update: rows_with(update, row_ids=np.array([-1]))),
    "a row beyond": ("row_not_leased", lambda update: rows_with(update, row_ids=np.array([2**62]))),
    "NaN in rows": ("not_finite", lambda update: rows_with(update, row_deltas=np.full((1, 1), np.nan, np.float32))),
    "too long": ("norm", lambda update: replace(update, dense={"w": np.full(1, 100, np.float32)})),
    "no number of bytes": (
        "not_finite",
        lambda update: replace(update, metrics={**update.metrics, "bytes_down": np.array([math.nan])}),
    ),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_update_is_refused_for_its_reason_and_moves_no_bit(kind: str) -> None:
    reason, changed = TAMPERED[kind]
    notes, bounds = Notes(), CheckSettings(max_norm=50.0, max_examples=50)
    made = parts(0, 1, 3, plugin=notes, transport=Tampering(changed), checks=bounds)
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 3))[:2])
    assert (report.refused, report.clients) == ({reason: 1}, 2)
    assert [told[3] for told in notes.told if told[0] == "refused"] == [reason]


def test_an_update_that_comes_twice_counts_once() -> None:
    notes = Notes()
    made = parts(0, 1, 3, plugin=notes, transport=Tampering(lambda update: update, times=3))
    state, rows, report = outcome(made)
    assert_same_bits((state, rows), outcome(parts(0, 1, 3))[:2])
    assert (report.refused, report.clients, report.dropped) == ({"repeated": 2}, 3, 0)
    assert not [told for told in notes.told if told[0] == "dropped"], "its first update counts"


def test_a_client_that_stands_twice_in_a_block_counts_once() -> None:
    class Twice:
        def exchange(
            self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
        ) -> Iterator[Updates]:
            yield visit(plan, cohort.clients).pick(np.array([0, 1, 1]))

    state, rows, report = outcome(parts(0, 1, transport=Twice()))
    assert_same_bits((state, rows), outcome(parts(0, 1))[:2])
    assert report.refused == {"repeated": 1}
