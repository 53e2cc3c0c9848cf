"""Quantisation and signs: how far off, right on average, and how many bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.aggregation import GridSum
from fedtower.core.buckets import BUCKET
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError, UpdateError
from fedtower.core.packing import as_bytes
from fedtower.core.testing import examples
from fedtower.core.testing.transform import TransformPromises
from fedtower.core.updates import Rows, Updates
from fedtower.plugins.transforms.quantize import Quantize
from fedtower.plugins.transforms.sign import Sign

BITS = (8, 4, 2, 1)


def of(values: Any) -> Updates:
    """Clients with one parameter ``w``."""
    deltas = np.asarray(values, dtype=np.float32)
    ids = np.arange(len(deltas), dtype=np.int64)
    return Updates(np.ones(len(deltas)), {"w": deltas}, clients=ids, rounds=np.ones(len(deltas), dtype=np.int64))


def seen(transform: Any, updates: Updates, seed: int = 1) -> Updates:
    back: Updates = transform.decode(transform.on_client(updates, {}, Draws(seed))[0])
    return back


def test_nearest_by_hand() -> None:
    values = [[1.0, -0.4, 0.6, 0.0]]
    assert seen(Quantize(bits=2, rounding="nearest"), of(values)).dense["w"].tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert seen(Quantize(bits=1, rounding="nearest"), of(values)).dense["w"].tolist() == [[0.5, -0.5, 0.5, 0.5]]
    sent, _ = Quantize(bits=2, rounding="nearest").on_client(of(values), {}, Draws(1))
    assert sent.encoded["w"].payload.tobytes() == as_bytes(np.array([[1.0]], dtype=np.float32)).tobytes() + bytes(
        [0b01100110]
    )


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([8, 4, 2]), st.integers(1, 1200), st.integers(0, 99), st.sampled_from(["nearest", "stochastic"]))
def test_nothing_is_further_off_than_a_step(bits: Any, size: int, seed: int, rounding: Any) -> None:
    values = Draws(seed).normal("values", np.arange(2 * size)).astype(np.float32).reshape(2, size)
    got = seen(Quantize(bits, rounding), of(values), seed).dense["w"]
    for start in range(0, size, BUCKET):
        part = values[:, start : start + BUCKET].astype(np.float64)
        step = np.abs(part).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        assert np.all(
            np.abs(got[:, start : start + BUCKET] - part) <= step * (0.5 if rounding == "nearest" else 1) + 1e-6
        )


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_is_right_on_average(bits: Any) -> None:
    wanted = np.array([1.0, 0.3, -0.7, 0.01, 0.0], dtype=np.float32)
    got = seen(Quantize(bits), of(np.tile(wanted, (20_000, 1)))).dense["w"]
    # The deviation of the mean of 20,000 draws from a step of at most 2 is below 0.0071.
    np.testing.assert_allclose(got.mean(axis=0, dtype=np.float64), wanted, atol=0.03)
    if bits > 1:
        assert np.all(got[:, 4] == 0), "a zero stays one"


def test_another_client_round_or_seed_rounds_otherwise() -> None:
    updates = of(np.tile(np.linspace(-1, 1, 64), (2, 1)))
    quantize = Quantize(bits=4)
    first, second = seen(quantize, updates).dense["w"]
    assert not np.array_equal(first, second)
    assert not np.array_equal(
        first, seen(quantize, replace(updates, rounds=updates.weights.astype(int) + 1)).dense["w"][0]
    )
    assert not np.array_equal(first, seen(quantize, updates, seed=2).dense["w"][0])


@pytest.mark.parametrize("bits", BITS)
def test_bytes_up_are_as_many_as_the_bits_say(bits: Any) -> None:
    updates = of(np.ones((3, 5000)))
    sent, _ = Quantize(bits).on_client(updates, {}, Draws(1))
    assert sent.sizes.tolist() == [8 + 4 + 4 * 10 + 5000 * bits // 8] * 3


def test_rows_have_a_scale_each_and_their_ids_in_gaps() -> None:
    rows = Rows(np.array([0, 2, 3]), np.array([9, 4, 100]), np.array([[1, -1], [100, 0], [0, 0]], dtype=np.float32))
    updates = replace(of(np.zeros((2, 0))), dense={}, rows={"item": rows})
    sent, _ = Quantize(bits=8, rounding="nearest").on_client(updates, {}, Draws(1))
    assert (np.diff(sent.encoded["rows of item"].offsets) == [5 + 1 + 1 + 2 * 6, 5 + 1 + 1 + 6]).all()
    back = seen(Quantize(bits=8, rounding="nearest"), updates).rows["item"]
    assert back.row_ids.tolist() == [4, 9, 100]
    np.testing.assert_allclose(back.row_deltas, [[100, 0], [1, -1], [0, 0]])


def test_a_code_that_there_is_not_is_refused() -> None:
    sent, _ = Quantize(bits=2).on_client(of([[1.0, 1.0, 1.0, 1.0]]), {}, Draws(1))
    spoilt = sent.encoded["w"].payload.copy()
    spoilt[-1] = 0xFF
    with pytest.raises(UpdateError, match="a code of 2 bits is at most 2, and 3 came"):
        Quantize(bits=2).decode(replace(sent, encoded={"w": replace(sent.encoded["w"], payload=spoilt)}))


def test_rows_that_are_there_twice_are_refused() -> None:
    updates = examples.updates(2)
    sent, _ = Quantize().on_client(updates, {}, Draws(1))
    with pytest.raises(UpdateError, match="rows of 'item' both encoded and not"):
        Quantize().decode(replace(sent, rows=updates.rows))


def test_the_majority_decides_how_large_its_deltas_ever_are() -> None:
    sign = Sign(step=0.5)
    total = GridSum()
    block = seen(sign, of([[1e-9, -3.0], [1e-9, 2.0], [-1e9, 2.0]]))
    assert block.dense["w"].tolist() == [[1, -1], [1, 1], [-1, 1]]
    total.add(block, block.weights)
    assert sign.finish(total.total(), examples.cohort()).dense["w"].tolist() == [[0.5, 0.5]]


def test_a_draw_moves_nothing_and_zeros_vote_by_a_coin() -> None:
    sign, total = Sign(step=0.5), GridSum()
    block = seen(sign, of([[1.0], [-1.0]]))
    total.add(block, block.weights)
    assert sign.finish(total.total(), examples.cohort()).dense["w"].tolist() == [[0.0]]
    assert abs(seen(sign, of(np.zeros((10_000, 1)))).dense["w"].mean()) < 0.05


def test_a_vote_that_is_no_sign_is_refused() -> None:
    with pytest.raises(UpdateError, match="votes are signs"):
        Sign(step=1.0).decode(of([[1e6]]))


def test_a_sign_is_a_bit() -> None:
    sent, _ = Sign(step=1.0).on_client(of(np.ones((2, 800))), {}, Draws(1))
    assert sent.sizes.tolist() == [8 + 4 + 1 + 100] * 2


def test_a_step_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="sign's step must be positive"):
        Sign(step=0.0)


class TestFourBits(TransformPromises):
    make = staticmethod(lambda: Quantize(bits=4))


class TestTwoBitsNearest(TransformPromises):
    make = staticmethod(lambda: Quantize(bits=2, rounding="nearest"))


class TestOneBit(TransformPromises):
    make = staticmethod(lambda: Quantize(bits=1))


class TestOneBitNearest(TransformPromises):
    make = staticmethod(lambda: Quantize(bits=1, rounding="nearest"))
