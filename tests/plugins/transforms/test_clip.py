"""Norm clipping: one norm over everything a client sends, and nobody above the bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_same_bits
from fedtower.core.testing.transform import TransformPromises
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.transforms.clip import Clip


def clipped(updates: Updates, norm: float) -> Updates:
    sent, _ = Clip(norm=norm).on_client(updates, {}, Draws(1))
    return sent


def lengths(updates: Updates) -> NDArray[np.float64]:
    """The L2 norm of each client's update, the plain way."""
    found = []
    for client in (updates.slice(place, place + 1) for place in range(len(updates))):
        arrays = [*client.dense.values(), *(rows.row_deltas for rows in client.rows.values())]
        found.append(np.linalg.norm(np.concatenate([array.astype(np.float64).ravel() for array in arrays])))
    return np.array(found)


def three_four() -> Updates:
    """A client whose dense delta is 3 long and whose rows are 4 long, and one that is a tenth of it."""
    deltas = np.array([[0.0, 4.0], [0.0, 0.0], [0.4, 0.0]], dtype=np.float32)
    return Updates(
        weights=np.ones(2),
        dense={"w": np.array([[3.0], [0.3]], dtype=np.float32)},
        rows={"item": Rows(np.array([0, 2, 3]), np.array([1, 2, 1]), deltas)},
        metrics={"loss": np.ones(2)},
    )


def test_three_and_four_make_five() -> None:
    sent = clipped(three_four(), 1.0)
    np.testing.assert_allclose(sent.dense["w"], [[3 / 5], [0.3]], rtol=1e-6)
    np.testing.assert_allclose(sent.rows["item"].row_deltas, [[0.0, 4 / 5], [0.0, 0.0], [0.4, 0.0]], rtol=1e-6)


def test_short_updates_keep_their_bits() -> None:
    sent, short = clipped(three_four(), 1.0).slice(1, 2), three_four().slice(1, 2)
    assert_same_bits((sent.dense, sent.rows), (short.dense, short.rows))


def test_it_says_who_was_shortened() -> None:
    metrics = clipped(three_four(), 1.0).metrics
    assert metrics["clipped"].tolist() == [1, 0]
    assert metrics["loss"].tolist() == [1, 1]
    assert clipped(three_four(), 5.0).metrics["clipped"].tolist() == [0, 0], "exactly at the bound is not above it"


@settings(deadline=None, max_examples=100)
@given(st.floats(1e-6, 1e6), st.integers(0, 1000), st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e37]))
def test_nobody_is_above_the_bound_not_even_by_rounding(norm: float, seed: int, scale: float) -> None:
    updates = examples.updates(3, seed=seed)
    updates = replace(
        updates,
        dense={name: (delta * scale).astype(np.float32) for name, delta in updates.dense.items()},
        rows={
            t: replace(part, row_deltas=(part.row_deltas * scale).astype(np.float32))
            for t, part in updates.rows.items()
        },
    )
    sent = clipped(updates, norm)
    before, after = lengths(updates), lengths(sent)
    assert np.all(after <= norm)
    np.testing.assert_allclose(after, np.minimum(before, norm), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_left_for_the_server_to_refuse(bad: float) -> None:
    updates = three_four()
    updates.dense["w"][0, 0] = bad
    sent = clipped(updates, 1.0)
    assert_same_bits((sent.dense, sent.rows), (updates.dense, updates.rows))
    assert sent.metrics["clipped"].tolist() == [0, 0]


def test_nobody_is_clipped_to_nothing() -> None:
    assert len(clipped(examples.updates(3).slice(0, 0), 1.0)) == 0


@pytest.mark.parametrize("norm", [0.0, -1.0, np.nan])
def test_a_bound_that_is_none_is_refused(norm: float) -> None:
    with pytest.raises(RecipeError, match="the norm of the transform 'clip' must be positive"):
        Clip(norm=norm)


class TestWhereNobodyIsClipped(TransformPromises):
    make = staticmethod(lambda: Clip(norm=1e9))


class TestWhereEverybodyIsClipped(TransformPromises):
    make = staticmethod(lambda: Clip(norm=1e-3))
