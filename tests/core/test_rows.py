"""Rows: local ids and back, and sums of duplicates, against plain loops."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.rows import distinct, localise, step_rows, sum_duplicates

law = settings(deadline=None, max_examples=100)

# Up to 4 clients with up to 6 slots each, of 8 rows.
slots = st.integers(0, 6).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 7), min_size=width, max_size=width), min_size=1, max_size=4).map(
        lambda lists: np.array(lists, dtype=np.int64).reshape(len(lists), width)
    )
)
some_ids = st.lists(st.integers(0, 7), max_size=40).map(lambda ids: np.array(ids, dtype=np.int64))


def values(count: int, dim: int = 3) -> NDArray[np.float32]:
    return Draws(1).normal("value", np.arange(count)[:, None], np.arange(dim)[None, :]).astype(np.float32)


def test_three_slots_of_two_clients_by_hand() -> None:
    needed, local = localise(np.array([[7, 3, 7], [3, 3, 3]]))
    assert needed.offsets.tolist() == [0, 2, 3]
    assert needed.ids.tolist() == [3, 7, 3]
    assert local.tolist() == [[1, 0, 1], [0, 0, 0]]


@given(slots)
@law
def test_local_ids_lead_back_to_the_ids(ids: NDArray[np.int64]) -> None:
    needed, local = localise(ids)
    assert len(needed.offsets) == len(ids) + 1
    for client, mine in enumerate(ids):
        assert needed.of(client).tolist() == sorted(set(mine.tolist()))
        assert needed.of(client)[local[client]].tolist() == mine.tolist()


@given(slots)
@law
def test_a_client_s_local_ids_do_not_depend_on_the_block(ids: NDArray[np.int64]) -> None:
    needed, local = localise(ids)
    for client in range(len(ids)):
        alone, local_alone = localise(ids[client : client + 1])
        assert alone.ids.tolist() == needed.of(client).tolist()
        assert local_alone[0].tolist() == local[client].tolist()


def test_nobody_needs_no_rows() -> None:
    needed, local = localise(np.zeros((0, 5), dtype=np.int64))
    assert needed.offsets.tolist() == [0]
    assert local.shape == (0, 5)


def test_duplicates_are_summed_by_hand() -> None:
    ids, sums = sum_duplicates(np.array([5, 2, 5]), np.array([[1, 10], [2, 20], [3, 30]], dtype=np.float32))
    assert ids.tolist() == [2, 5]
    assert sums.tolist() == [[2, 20], [4, 40]]


@given(some_ids)
@law
def test_sums_of_duplicates_are_numpy_s(ids: NDArray[np.int64]) -> None:
    # Sums of small integers are exact in any order, so these must be equal to the bit.
    whole = np.rint(values(len(ids)) * 100).astype(np.float32)
    wanted = np.zeros((8, 3), dtype=np.float32)
    np.add.at(wanted, ids, whole)
    distinct, sums = sum_duplicates(ids, whole)
    assert distinct.tolist() == sorted(set(ids.tolist()))
    assert sums.dtype == np.float32
    np.testing.assert_array_equal(sums, wanted[distinct])


@given(some_ids)
@law
def test_which_other_ids_are_there_changes_no_bit(ids: NDArray[np.int64]) -> None:
    given_values = values(len(ids))
    distinct, sums = sum_duplicates(ids, given_values)
    for place, row in enumerate(distinct):
        (_, alone) = sum_duplicates(ids[ids == row], given_values[ids == row])
        np.testing.assert_array_equal(alone[0], sums[place])


# Dense ids are marked; sparse and negative ones are sorted.
@given(st.lists(st.one_of(st.integers(0, 7), st.integers(-3, 9), st.sampled_from([10**9, 10**12])), max_size=30))
@law
def test_distinct_ids_are_those_of_numpy(given_ids: list[int]) -> None:
    ids = np.array(given_ids, dtype=np.int64)
    found, place = distinct(ids)
    wanted, inverse = np.unique(ids, return_inverse=True)
    assert found.dtype == place.dtype == np.int64
    assert found.tolist() == wanted.tolist()
    assert place.tolist() == inverse.tolist()


def test_nothing_sums_to_nothing() -> None:
    ids, sums = sum_duplicates(np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.float32))
    assert ids.shape == (0,)
    assert sums.shape == (0, 3)


def test_a_step_moves_touched_rows_once_and_leaves_the_others() -> None:
    rows = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    stepped = step_rows(rows, np.array([2, 0, 2]), np.array([[1.0], [4.0], [3.0]], dtype=np.float32), lr=0.5)
    assert stepped.tolist() == [[1 - 0.5 * 4], [2], [3 - 0.5 * (1 + 3)]]
    assert rows.tolist() == [[1], [2], [3]], "the rows that were given are left alone"
    assert stepped.dtype == np.float32


def test_a_step_without_slots_moves_nothing() -> None:
    rows = values(3)
    np.testing.assert_array_equal(
        step_rows(rows, np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.float32), lr=0.5), rows
    )
