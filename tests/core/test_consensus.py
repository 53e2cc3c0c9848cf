"""Consensus: questions in pieces, in the order of the clients' ids, and what is not fit to be asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core import consensus
from fedtower.core.consensus import Consensus, assumed, gathered
from fedtower.core.errors import ShapeMismatch, UpdateError
from fedtower.core.jagged import Encoded
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_close, assert_same_bits
from fedtower.core.updates import Rows, Updates


def first_by_id(distances: np.ndarray, weights: np.ndarray) -> np.ndarray:
    shares = np.zeros_like(weights)
    shares[:, 0] = 1.0
    return shares


def nearest_to_all(distances: np.ndarray, weights: np.ndarray) -> np.ndarray:
    pull = weights / (1.0 + distances.sum(axis=2))
    return np.asarray(pull / pull.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("room", [1, 7, 40])
def test_how_much_is_looked_at_at_a_time_changes_nothing(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Consensus(gathered([examples.updates(9)]))
    middle, mixed = asked.by_coordinate(lambda said: np.median(said, axis=1)), asked.by_vector(nearest_to_all)
    monkeypatch.setattr(consensus, "ROOM", room)
    assert_same_bits(asked.by_coordinate(lambda said: np.median(said, axis=1)), middle)
    assert_close(asked.by_vector(nearest_to_all), mixed)


def test_each_row_is_answered_by_those_who_touched_it() -> None:
    cohort = examples.updates(9)
    part = cohort.rows["item"]
    total = Consensus(gathered([cohort])).by_coordinate(lambda said: said.max(axis=1))
    rows = total.rows["item"]
    assert rows.row_ids.tolist() == sorted(set(part.row_ids.tolist()))
    assert rows.row_weights is not None
    for at, row in enumerate(rows.row_ids.tolist()):
        said = part.row_deltas[part.row_ids == row]
        np.testing.assert_array_equal(rows.row_deltas[at], said.max(axis=0))
        assert rows.row_weights[at] == len(said)


def test_distances_are_those_of_the_vectors() -> None:
    cohort, seen = examples.updates(5), []

    def note(distances: np.ndarray, weights: np.ndarray) -> np.ndarray:
        seen.append(distances)
        return first_by_id(distances, weights)

    Consensus(gathered([replace(cohort, rows={})])).by_vector(note)
    vectors = np.concatenate([delta.reshape(5, -1).astype(np.float64) for delta in cohort.dense.values()], axis=1)
    wanted = np.square(vectors[:, None] - vectors[None, :]).sum(axis=2)
    np.testing.assert_allclose(seen[0][0], wanted, rtol=1e-9, atol=1e-12)


def test_clients_stand_in_the_order_of_their_ids_and_without_weight_they_do_not_stand() -> None:
    cohort = replace(examples.updates(4), clients=np.array([7, 3, 9, 5]), weights=np.array([1.0, 2, 0, 4]))
    held = gathered([cohort.slice(0, 2), cohort.slice(2, 2), cohort.slice(2, 4)], "examples")
    assert held.clients is not None
    assert held.clients.tolist() == [3, 5, 7]
    assert held.weights.tolist() == [2, 4, 1]
    assert gathered([cohort]).weights.tolist() == [1, 1, 1]
    total = Consensus(held).by_vector(first_by_id)
    assert all(np.array_equal(total.dense[name][0], delta[1]) for name, delta in cohort.dense.items())


@given(st.floats(0, 0.49), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_attackers_are_never_half_and_never_fewer_than_their_share_of_enough(share: float, clients: int) -> None:
    count = assumed(share, clients)
    assert 2 * count < clients
    assert count >= min(share * clients - 1e-6, (clients - 1) // 2)


def test_what_is_not_fit_is_refused_with_whose_it_is() -> None:
    cohort = examples.updates(4)
    cohort.dense["scale"][2] = np.inf
    with pytest.raises(UpdateError, match=r"'scale' by the clients \[8\] is not finite"):
        gathered([cohort])
    cohort = examples.updates(4)
    cohort.rows["item"].row_deltas[cohort.rows["item"].offsets[1]] = np.nan
    with pytest.raises(UpdateError, match=r"'rows of item' by the clients \[5\] is not finite"):
        gathered([cohort])
    twice = Rows(np.array([0, 2]), np.array([4, 4]), np.zeros((2, 1), np.float32))
    with pytest.raises(UpdateError, match="sent a row of 'item' more than once"):
        gathered([Updates(np.ones(1), rows={"item": twice}, clients=np.array([3]))])
    with pytest.raises(UpdateError, match="weights must be finite and not negative"):
        gathered([replace(examples.updates(2), weights=np.array([1.0, -1.0]))])
    with pytest.raises(UpdateError, match="no transform's decode gave them back"):
        gathered([Updates(np.ones(1), encoded={"w": Encoded.of("bytes", (1,), [b"abcd"])})])
    with pytest.raises(ShapeMismatch):
        gathered([examples.updates(2), examples.updates(2, rows=False)])
    with pytest.raises(UpdateError, match="there is nothing to fold"):
        gathered([replace(examples.updates(2), weights=np.zeros(2))])
