"""The server's step: what moves, by how much, and what is refused, by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.errors import ShapeMismatch
from fedtower.core.plan import PublicSettings, RowSettings
from fedtower.core.server import Schedule, ServerState, averaged, step
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.server_optimizers.sgd import SGD
from tests.core.small_round import Table

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


def rows() -> Rows:
    """Clients of weight 4 touched row 0 and moved it by 8 on average; clients of weight 1 touched row 3."""
    deltas = np.array([[8.0], [2.0]], dtype=np.float32)
    return Rows(np.array([0, 2]), np.array([0, 3]), deltas, row_weights=np.array([4.0, 1.0]))


def total() -> Updates:
    return Updates(np.array([16.0]), {"w": np.array([[2.0, -4.0]], dtype=np.float32)}, {"item": rows()})


def state() -> ServerState:
    return ServerState(6, {"w": np.array([1.0, 1.0], dtype=np.float32)}, aggregator={"kept": np.ones(1)})


def test_shared_parameters_move_by_both_rates_times_the_mean_delta() -> None:
    after = step(state(), total(), SGD(), None, lr=0.5, lr_scale=0.25, rows=RowSettings())
    assert after.parameters["w"].tolist() == [1 + 0.125 * 2, 1 - 0.125 * 4]
    assert after.round == 7
    assert after.aggregator == state().aggregator
    assert after.generation == 0


def test_the_optimiser_s_memory_is_kept() -> None:
    momentum = SGD(momentum=0.5)
    first = replace(state(), optimizer=momentum.init(state().parameters))
    second = step(first, total(), momentum, None, lr=1.0, lr_scale=1.0, rows=RowSettings())
    third = step(second, total(), momentum, None, lr=1.0, lr_scale=1.0, rows=RowSettings())
    # v = 2, then 0.5 x 2 + 2 = 3
    assert third.parameters["w"][0] == 1 + 2 + 3


def test_a_row_moves_over_the_whole_cohort_s_weight() -> None:
    assert averaged(rows(), "cohort", weight=16.0).tolist() == [[8 * 4 / 16], [2 * 1 / 16]]
    table = Table()
    after = step(state(), total(), SGD(), table, lr=1.0, lr_scale=0.5, rows=RowSettings(average="cohort"))
    assert table.rows.ravel().tolist() == [0.5 * 2, 0, 0, 0.5 * 0.125]
    assert after.generation == 1


def test_or_over_the_weight_of_those_who_touched_it() -> None:
    assert averaged(rows(), "touched", weight=16.0).tolist() == [[8], [2]]
    table = Table()
    step(state(), total(), SGD(), table, lr=1.0, lr_scale=1.0, rows=RowSettings(average="touched"))
    assert table.rows.ravel().tolist() == [8, 0, 0, 2]


def test_averages_stay_in_single_precision() -> None:
    assert averaged(rows(), "cohort", weight=3.0).dtype == np.float32


def test_frozen_rows_stay() -> None:
    table = Table()
    after = step(state(), total(), SGD(), table, lr=1.0, lr_scale=1.0, rows=RowSettings(train="frozen"))
    assert not table.rows.any()
    assert after.generation == 0


class Public:
    """Moves the last row by what the parameter has become, and remembers when and at what rate."""

    def __init__(self, table: Table) -> None:
        self.table, self.told = table, (0, 0.0)

    def train(self, round: int, parameters: Mapping[str, FloatArray], lr_scale: float) -> None:
        self.table.rows[3] = parameters["w"][0]
        self.table.generation += 2
        self.told = (round, lr_scale)


def test_public_data_trains_the_rows_in_the_devices_stead_after_the_towers_moved() -> None:
    table = Table()
    public, rows = Public(table), RowSettings(train="public", public=PublicSettings(share=0.5))
    after = step(state(), total(), SGD(), table, lr=1.0, lr_scale=0.5, rows=rows, public=public)
    assert after.parameters["w"].tolist() == [2, -1]
    assert table.rows.ravel().tolist() == [0, 0, 0, 2]
    assert (public.told, after.generation) == ((7, 0.5), 2)


def test_where_devices_train_the_rows_public_data_does_not() -> None:
    table = Table()
    public = Public(table)
    step(state(), total(), SGD(), table, lr=1.0, lr_scale=1.0, rows=RowSettings(), public=public)
    assert public.told == (0, 0.0)
    assert table.rows[0] != 0


def test_a_total_without_rows_leaves_the_table_alone() -> None:
    table = Table()
    after = step(state(), replace(total(), rows={}), SGD(), table, lr=1.0, lr_scale=1.0, rows=RowSettings())
    assert after.generation == 0
    assert after.round == 7


@pytest.mark.parametrize(
    ("dense", "got"), [({}, "nothing"), ({"w": np.zeros((1, 3), np.float32)}, r"\(3,\)")], ids=["missing", "wide"]
)
def test_a_total_that_does_not_fit_is_refused(dense: Mapping[str, FloatArray], got: str) -> None:
    with pytest.raises(ShapeMismatch, match=rf"round 7 must hold 'w' with shape \(2,\), not {got}"):
        step(state(), replace(total(), dense=dense), SGD(), None, lr=1.0, lr_scale=1.0, rows=RowSettings())


def test_rates_fall_linearly_to_their_share_in_the_last_round() -> None:
    falling = Schedule("linear", to=0.2, rounds=5)
    assert [falling(round) for round in (1, 2, 3, 4, 5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert falling(9) == pytest.approx(0.2), "and stay there"


def test_rates_stay_without_decay_and_in_a_single_round() -> None:
    assert Schedule("none", to=0.2, rounds=5)(5) == 1
    assert Schedule("linear", to=0.2, rounds=1)(1) == 1
