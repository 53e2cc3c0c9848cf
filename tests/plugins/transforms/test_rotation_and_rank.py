"""A rotation before few bits, and low rank: how near they come, and what stays."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.testing.transform import TransformPromises
from fedtower.core.updates import FloatArray, Updates
from fedtower.plugins.transforms.eden import CENTROIDS, Eden
from fedtower.plugins.transforms.low_rank import LowRank

BITS: tuple[Any, ...] = (1, 2, 4)
# Max, 1960, table I: what the best 2, 4 and 16 values leave of the variance of a normal.
DISTORTION = {1: 0.3634, 2: 0.1175, 4: 0.009497}


def of(values: Any, round: int = 1) -> Updates:
    """Clients with one parameter ``w``."""
    deltas = np.asarray(values, dtype=np.float32)
    ids = np.arange(len(deltas), dtype=np.int64)
    return Updates(np.ones(len(deltas)), {"w": deltas}, clients=ids, rounds=np.full(len(deltas), round))


def normals(*shape: int, seed: int = 1) -> FloatArray:
    return Draws(seed).normal("values", np.arange(math.prod(shape))).reshape(shape).astype(np.float32)


def eden(bits: Any, values: Any) -> FloatArray:
    transform = Eden(bits)
    return np.asarray(transform.decode(transform.on_client(of(values), {}, Draws(1))[0]).dense["w"])


@pytest.mark.parametrize("bits", BITS)
def test_each_value_is_the_mean_of_the_normal_that_is_put_to_it(bits: Any) -> None:
    values = CENTROIDS[bits]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
    for value, low, high in zip(values, edges[:-1], edges[1:], strict=True):
        density = [math.exp(-(edge**2) / 2) / math.sqrt(2 * math.pi) for edge in (low, high)]
        below = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in (low, high)]
        assert value == pytest.approx((density[0] - density[1]) / (below[1] - below[0]), abs=2e-3)


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_that_of_the_best_quantiser_of_a_normal_whatever_is_sent(bits: Any) -> None:
    spiky = np.zeros((20, 5000), dtype=np.float32)
    spiky[:, 7], spiky[:, 4999] = 100.0, -3.0
    for values in (normals(20, 5000), normals(20, 5000) ** 3, spiky + 0.01 * normals(20, 5000)):
        error = np.square(eden(bits, values) - values).sum(axis=1) / np.square(values).sum(axis=1)
        # The unbiased scale costs d / (1 - d) where the biased one costs d.
        assert error.mean() < 1.2 * DISTORTION[bits] / (1 - DISTORTION[bits])
    error = np.square(eden(bits, normals(20, 8192)) - normals(20, 8192)).mean()
    assert error == pytest.approx(DISTORTION[bits] / (1 - DISTORTION[bits]), rel=0.05)


def test_the_mean_over_clients_is_what_they_all_sent() -> None:
    wanted = normals(200)
    got = eden(1, np.tile(wanted, (4000, 1)))
    np.testing.assert_allclose(got @ wanted, wanted @ wanted, rtol=1e-4)
    assert np.linalg.norm(got.mean(axis=0) - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 84, 4096, 4097, 48_000])
def test_every_size_comes_back_in_as_many_bytes_as_said(size: int) -> None:
    values = normals(2, size)
    sent, _ = Eden(4).on_client(of(values), {}, Draws(1))
    pieces = max(-(-size // 4096), 1)
    width = 1 << (-(-size // pieces) - 1).bit_length()
    assert sent.sizes.tolist() == [8 + 4 + 4 + 4 * pieces + -(-pieces * width // 2)] * 2
    np.testing.assert_allclose(eden(4, values), values, atol=1.5)


def test_what_has_the_rank_is_sent_whole() -> None:
    transform = LowRank(rank=2)
    values = normals(3, 20, 2) @ normals(3, 2, 30, seed=2)
    plan = Plan(1, {"w": values[0]}, LocalSettings(steps=1))
    state = {name: np.zeros((3, *shape), dtype=np.float32) for name, shape in transform.state(plan).items()}
    sent, kept = transform.on_client(of(values), state, Draws(1))
    assert sent.sizes.tolist() == [8 + 4 + 4 * 2 * (20 + 30)] * 3
    np.testing.assert_allclose(transform.decode(sent).dense["w"], values, atol=1e-4)
    np.testing.assert_allclose(kept["residual/w"], 0, atol=1e-4)


def test_what_a_rank_misses_is_sent_later_and_the_iteration_finds_the_best_factors() -> None:
    transform = LowRank(rank=1)
    values = np.diag(np.array([5, 4, 3, 2, 1], dtype=np.float32))[None]
    plan = Plan(1, {"w": values[0]}, LocalSettings(steps=1))
    state: Any = {name: np.zeros((1, *shape), dtype=np.float32) for name, shape in transform.state(plan).items()}
    total = np.zeros_like(values)
    for round in range(1, 41):
        sent, state = transform.on_client(of(values if round == 1 else 0 * values, round), state, Draws(1))
        total += transform.decode(sent).dense["w"]
        np.testing.assert_allclose(total + state["residual/w"], values, atol=1e-5)
    assert np.abs(state["residual/w"]).max() < 0.05


def test_what_factors_would_not_make_smaller_stays_as_it_is() -> None:
    values = normals(2, 3, 3)
    sent, kept = LowRank(rank=2).on_client(of(values), {}, Draws(1))
    assert not sent.encoded
    assert kept == {}
    np.testing.assert_array_equal(sent.dense["w"], values)


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="rank must be at least 1"):
        LowRank(rank=0)


class TestOneBit(TransformPromises):
    make = staticmethod(lambda: Eden(1))


class TestFourBits(TransformPromises):
    make = staticmethod(lambda: Eden(4))


class TestRankOne(TransformPromises):
    make = staticmethod(lambda: LowRank(rank=1))
