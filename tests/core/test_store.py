"""ClientStore: what was written is read, nothing else, against a plain dictionary."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.errors import CheckpointError, ShapeMismatch
from fedtower.core.store import ClientStore

law = settings(deadline=None, max_examples=60)

FIRST = np.array([7.0, 8.0], dtype=np.float32)
visits = st.lists(st.lists(st.integers(0, 19), unique=True, max_size=8), max_size=8)


def store(*names: str) -> ClientStore:
    """Twenty clients that keep two numbers by each name."""
    made = ClientStore(20)
    for name in names:
        made.declare(name, FIRST)
    return made


def ids(*clients: int) -> NDArray[np.int64]:
    return np.array(clients, dtype=np.int64)


def written(cohorts: list[list[int]]) -> tuple[ClientStore, dict[int, list[float]]]:
    """A store after visits of these cohorts, and a dictionary that says what it must hold."""
    kept, plain = store("mine"), dict[int, list[float]]()
    for visit, clients in enumerate(cohorts):
        values = np.array([[100 * visit + client, -client] for client in clients], dtype=np.float32).reshape(-1, 2)
        kept.write("mine", ids(*clients), values)
        plain |= dict(zip(clients, values.tolist(), strict=True))
    return kept, plain


def test_everybody_starts_with_the_declared_value() -> None:
    assert store("mine").read("mine", ids(3, 0, 3)).tolist() == [[7, 8]] * 3
    assert store("mine", "other").names == ("mine", "other")


@given(visits)
@law
def test_the_last_value_written_is_the_one_that_is_read(cohorts: list[list[int]]) -> None:
    kept, plain = written(cohorts)
    wanted = [plain.get(client, FIRST.tolist()) for client in range(20)]
    assert kept.read("mine", np.arange(20)).tolist() == wanted


def test_reading_nobody_reads_nothing() -> None:
    assert store("mine").read("mine", ids()).shape == (0, 2)


def test_what_is_read_is_the_reader_s_own() -> None:
    kept = store("mine")
    kept.write("mine", ids(4), np.ones((1, 2), dtype=np.float32))
    for client in (4, 5):
        kept.read("mine", ids(client))[:] = 99
    assert kept.read("mine", ids(4, 5)).tolist() == [[1, 1], [7, 8]]


def test_names_do_not_share_values() -> None:
    kept = store("mine", "other")
    kept.write("mine", ids(4), np.ones((1, 2), dtype=np.float32))
    assert kept.read("other", ids(4)).tolist() == [[7, 8]]


@given(visits)
@law
def test_a_snapshot_holds_what_was_written_and_restores_it(cohorts: list[list[int]]) -> None:
    kept, plain = written(cohorts)
    arrays = {name: array.copy() for name, array in kept.snapshot().items()}
    assert arrays["mine.clients"].tolist() == sorted(plain)
    assert arrays["mine.values"].tolist() == [plain[client] for client in sorted(plain)]
    again = store("mine")
    again.write("mine", ids(1), np.zeros((1, 2), dtype=np.float32))  # forgotten when it is restored
    again.restore(arrays)
    np.testing.assert_array_equal(again.read("mine", np.arange(20)), kept.read("mine", np.arange(20)))


@given(visits, visits)
@law
def test_a_restored_store_goes_on_alike(before: list[list[int]], after: list[list[int]]) -> None:
    kept, _ = written(before)
    again = store("mine")
    again.restore(kept.snapshot())
    for clients in after:
        values = np.full((len(clients), 2), len(clients), dtype=np.float32)
        kept.write("mine", ids(*clients), values)
        again.write("mine", ids(*clients), values)
    for name, array in kept.snapshot().items():
        np.testing.assert_array_equal(array, again.snapshot()[name])


def test_a_snapshot_is_not_changed_by_later_visits() -> None:
    kept, _ = written([[3, 1]])
    taken = kept.snapshot()
    kept.write("mine", ids(1), np.zeros((1, 2), dtype=np.float32))
    assert taken["mine.values"].tolist() == [[1, -1], [3, -3]]


def test_a_snapshot_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"holds no client state 'other'.*with the recipe it was written with"):
        store("mine", "other").restore(store("mine").snapshot())


@pytest.mark.parametrize("shape", [(2, 1), (2,), (1, 2), (2, 2, 1)])
def test_values_of_another_shape_are_refused_and_not_broadcast(shape: tuple[int, ...]) -> None:
    kept = store("mine")
    with pytest.raises(ShapeMismatch, match="'mine' was declared with shape"):
        kept.write("mine", ids(3, 4), np.zeros(shape, dtype=np.float32))
    assert kept.read("mine", ids(3, 4)).tolist() == [[7, 8]] * 2


def test_numbers_and_matrices_can_be_kept_too() -> None:
    kept = ClientStore(5)
    kept.declare("number", np.float32(2.0) * np.ones((), dtype=np.float32))
    kept.declare("matrix", np.eye(2, dtype=np.float32))
    kept.write("number", ids(1), np.array([9.0], dtype=np.float32))
    assert kept.read("number", ids(0, 1)).tolist() == [2, 9]
    assert kept.read("matrix", ids(3)).shape == (1, 2, 2)


def test_memory_grows_with_those_who_wrote_and_not_with_the_population() -> None:
    tracemalloc.start()
    try:
        kept = ClientStore(1_000_000)
        kept.declare("mine", np.zeros(64, dtype=np.float32))
        for start in range(0, 900, 100):
            kept.write("mine", np.arange(start, start + 100), np.ones((100, 64), dtype=np.float32))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Four bytes a client, and at most twice what was written: everybody's values would be 256 MB.
    assert held < 4 * 1_000_000 + 2 * 900 * 64 * 4 + 100_000
