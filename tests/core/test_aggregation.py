"""GridSum: the sum whose bits do not depend on who came first, by hand, against exact fractions, and by law."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.aggregation import GRID, LIMIT, GridSum
from fedtower.core.errors import ShapeMismatch, UpdateError
from fedtower.core.jagged import Encoded
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.updates import Rows, Updates, stack

law = settings(deadline=None, max_examples=60)


def block(weights: list[float], bias: list[list[float]], clients: list[int] | None = None) -> Updates:
    ids = np.arange(len(weights)) if clients is None else np.array(clients)
    return Updates(np.array(weights), {"bias": np.array(bias, dtype=np.float32)}, clients=ids)


def touching(weights: list[float], ids: list[list[int]], delta: float = 1.0) -> Updates:
    """Clients that each send ``delta`` for some rows of a table of one column."""
    offsets = np.concatenate([[0], np.cumsum([len(mine) for mine in ids])])
    flat = np.array([row for mine in ids for row in mine], dtype=np.int64)
    rows = Rows(offsets, flat, np.full((len(flat), 1), delta, dtype=np.float32))
    return Updates(np.array(weights), rows={"item": rows}, clients=np.arange(len(weights)))


def total_of(*blocks: Updates) -> Updates:
    total = GridSum()
    for each in blocks:
        total.add(each, each.weights)
    return total.total()


def select(whole: Updates, order: list[int]) -> Updates:
    """The clients of a block in another order."""
    return stack([whole.slice(client, client + 1) for client in order])


def test_two_clients_by_hand() -> None:
    total = total_of(block([1, 3], [[2, 0], [6, -4]]))
    assert total.dense["bias"].tolist() == [[(1 * 2 + 3 * 6) / 4, (1 * 0 + 3 * -4) / 4]]
    assert total.weights.tolist() == [4]
    assert total.clients is None


def test_a_row_s_mean_is_over_those_who_touched_it() -> None:
    ids = np.array([5, 9, 5])
    deltas = np.array([[2.0], [8.0], [6.0]], dtype=np.float32)
    total = total_of(Updates(np.array([1.0, 3.0]), rows={"item": Rows(np.array([0, 2, 3]), ids, deltas)}))
    rows = total.rows["item"]
    assert rows.row_ids.tolist() == [5, 9]
    assert rows.row_deltas.tolist() == [[(1 * 2 + 3 * 6) / 4], [8]]
    assert rows.row_weights is not None
    assert rows.row_weights.tolist() == [4, 1]


@given(st.lists(st.tuples(st.integers(1, 2000), st.floats(-1000, 1000, width=32)), min_size=1, max_size=20))
@law
def test_the_mean_is_the_exact_one_to_half_a_grid_step_a_client(pairs: list[tuple[int, float]]) -> None:
    total = total_of(block([float(weight) for weight, _ in pairs], [[delta] for _, delta in pairs]))
    weight = sum(Fraction(weight) for weight, _ in pairs)
    exact = sum(Fraction(weight) * Fraction(delta) for weight, delta in pairs) / weight
    got = float(total.dense["bias"][0, 0])
    allowed = len(pairs) * GRID / 2 / float(weight) + abs(float(exact)) * 2.0**-24
    assert abs(got - float(exact)) <= allowed


@given(st.permutations(range(7)), st.lists(st.integers(0, 7), max_size=6), st.integers(0, 1000))
@law
def test_order_and_width_of_blocks_change_no_bit(order: list[int], cuts: list[int], seed: int) -> None:
    whole = examples.cancelling(seed=seed)
    mixed, edges = select(whole, order), sorted([0, *cuts, 7])
    assert_same_bits(total_of(*(mixed.slice(*edge) for edge in pairwise(edges))), total_of(whole))


def test_a_plain_sum_of_floats_has_other_bits_in_another_order() -> None:
    # What the grid is for; without this the law above could hold by luck.
    whole = examples.cancelling()
    one, other = (
        np.add.accumulate(each.dense["tower.weight"] * each.weights[:, None, None], axis=0)[-1].astype(np.float32)
        for each in (whole, select(whole, [3, 0, 1, 2, 4, 5, 6]))
    )
    assert np.any(one != other)


def test_weights_are_the_caller_s() -> None:
    both, total = block([1, 3], [[2], [6]]), GridSum()
    total.add(both, np.array([1.0, 1.0]))
    assert total.total().dense["bias"].tolist() == [[4]]
    assert total.total().weights.tolist() == [2]


def test_clients_without_weight_change_nothing() -> None:
    some, none = touching([2], [[4]]), touching([0], [[4, 8]], delta=9)
    assert_same_bits(total_of(some, none), total_of(some))
    assert_same_bits(total_of(none, some), total_of(some))
    dense = block([2, 0], [[1, 2], [100, 100]])
    assert_same_bits(total_of(dense), total_of(dense.slice(0, 1)))


def test_nothing_and_no_weight_are_refused() -> None:
    with pytest.raises(UpdateError, match="no client sent an update with a positive weight"):
        total_of()
    with pytest.raises(UpdateError, match="no client sent an update with a positive weight"):
        total_of(block([0, 0], [[1], [2]]))


def test_an_empty_block_is_no_update() -> None:
    empty = examples.updates(7).slice(0, 0)
    for nobody in (empty, stack([])):
        assert_same_bits(total_of(nobody, examples.updates(7), nobody), total_of(examples.updates(7)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_who_sent_what_is_not_finite_is_named(bad: float, weight: float) -> None:
    with pytest.raises(UpdateError, match=r"'bias' by the clients \[12\] is not finite; refuse it"):
        total_of(block([1, weight, 1], [[0, 0], [0, bad], [0, 0]], clients=[11, 12, 13]))
    twelve = touching([1, weight, 1], [[3], [3, 4], [3]])
    twelve.rows["item"].row_deltas[2] = bad
    with pytest.raises(UpdateError, match=r"'rows of item' by the clients \[1\] is not finite"):
        total_of(twelve)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_weights_that_are_none_are_refused_by_name(bad: float) -> None:
    with pytest.raises(UpdateError, match=r"not negative, but those of the clients \[12\] are \[.*\]"):
        total_of(block([1, bad, 1], [[0], [0], [0]], clients=[11, 12, 13]))
    three, total = block([1, bad, 1], [[0], [0], [0]], clients=[11, 12, 13]), GridSum()
    with pytest.raises(UpdateError, match=r"the clients \[12\]"):
        total.add(three, np.ones(3))


def test_the_limit_is_where_it_is_said_to_be() -> None:
    below = float(np.nextafter(np.float32(LIMIT * GRID / 2), np.float32(0)))
    total = total_of(block([1, 1], [[below], [below]]))
    assert total.dense["bias"].tolist() == [[below]]
    with pytest.raises(
        UpdateError, match=r"too large to sum exactly: they reach 1.07e\+09, and the limit is 1.07e\+09"
    ):
        total_of(block([1, 1], [[LIMIT * GRID / 2], [LIMIT * GRID / 2]]))


@pytest.mark.parametrize("value", [2.0**30, 2.0**31, 1e20, 3e38])
@pytest.mark.parametrize("width", [1, 3])
def test_a_sum_that_could_overflow_is_refused_whatever_the_width_of_blocks(value: float, width: int) -> None:
    whole = block([1, 1, 1], [[1], [value], [1]], clients=[4, 5, 6])
    with pytest.raises(UpdateError, match=r"the largest is of the clients \[5\]. Clip them"):
        total_of(*(whole.slice(start, start + width) for start in range(0, 3, width)))


def test_a_sum_that_cannot_overflow_is_taken_whatever_the_width_of_blocks() -> None:
    # One client near the limit, and many that are small: the widest bound, the largest times the width, would refuse.
    whole = block([1.0] * 100, [[2.0**29]] + [[1.0]] * 99)
    assert_same_bits(total_of(whole), total_of(*(whole.slice(i, i + 1) for i in range(100))))


@pytest.mark.parametrize("weight", [2.0**30, 2.0**31, 1e300])
def test_weights_that_could_overflow_are_refused(weight: float) -> None:
    with pytest.raises(UpdateError, match="'the weights'"):
        total_of(block([weight], [[0.0]]))


def test_clients_that_send_another_shape_are_refused_and_not_broadcast() -> None:
    wide, narrow = block([1], [[1, 2, 3]], clients=[4]), block([1], [[5]], clients=[7])
    with pytest.raises(ShapeMismatch, match=r"the clients \[7\] sent 'bias' with shape \(1,\) where others"):
        total_of(wide, narrow)


def test_clients_that_leave_something_out_are_refused_and_do_not_dilute_it() -> None:
    whole = examples.updates(2)
    for other in (
        replace(whole, dense={"scale": whole.dense["scale"]}),
        replace(whole, rows={}),
        replace(whole, dense={**whole.dense, "more": whole.dense["scale"]}),
    ):
        with pytest.raises(ShapeMismatch, match="are they on an older plan"):
            total_of(whole, other)


def test_a_client_that_sends_a_row_twice_is_refused() -> None:
    with pytest.raises(UpdateError, match=r"the clients \[1\] sent a row of 'item' more than once"):
        total_of(touching([1, 1], [[3], [8, 3, 8]]))


def test_rows_need_not_be_sorted() -> None:
    total = total_of(touching([1, 3], [[9, 2], [3, 2]]))
    assert total.rows["item"].row_ids.tolist() == [2, 3, 9]
    weights: NDArray[np.float64] | None = total.rows["item"].row_weights
    assert weights is not None
    assert weights.tolist() == [4, 3, 1]


def test_clients_that_touched_no_row_still_count_in_the_weight() -> None:
    total = total_of(touching([1, 3], [[], [2]]))
    assert total.weights.tolist() == [4]
    assert total_of(touching([1, 3], [[], []])).rows["item"].offsets.tolist() == [0, 0]


def test_what_is_still_encoded_is_refused() -> None:
    block = Updates(np.ones(1), clients=np.array([4]), encoded={"w": Encoded.of("packed", (), [b"four"])})
    with pytest.raises(UpdateError, match=r"the clients \[4\] sent \['w'\] encoded, and no transform's decode"):
        GridSum().add(block, block.weights)
