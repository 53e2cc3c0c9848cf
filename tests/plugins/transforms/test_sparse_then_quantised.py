"""A sparsifier, then quantisation: the places are the one's, the values the other's, and the bytes of both are few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core import transform as chain
from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import UpdateError
from fedtower.core.jagged import Encoded
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.sparse import BITMAP
from fedtower.core.testing.transform import TransformPromises
from fedtower.core.transform import States, Transform
from fedtower.core.updates import Updates
from fedtower.plugins.transforms.dgc import DGC
from fedtower.plugins.transforms.quantize import Quantize
from fedtower.plugins.transforms.selective_sgd import SelectiveSGD
from fedtower.plugins.transforms.top_k import TopK

DRAWS = Draws(1)


@dataclass(frozen=True)
class Chain:
    """Two transforms as one, run by the functions that run a recipe's."""

    first: Transform
    second: Transform

    def state(self, plan: Plan) -> Mapping[str, tuple[int, ...]]:
        return self.first.state(plan)

    def on_client(self, updates: Updates, state: States, draws: Draws) -> tuple[Updates, States]:
        sent, kept = chain.on_client((self.first, self.second), updates, [state, {}], draws)
        return sent, kept[0]

    def decode(self, block: Updates) -> Updates:
        return chain.decode((self.first, self.second), block)

    def finish(self, total: Updates, cohort: Cohort) -> Updates:
        return chain.finish((self.first, self.second), total, cohort)


def of(values: Any) -> Updates:
    """Clients with one parameter ``w``."""
    deltas = np.asarray(values, dtype=np.float32)
    ids = np.arange(len(deltas), dtype=np.int64)
    return Updates(np.ones(len(deltas)), {"w": deltas}, clients=ids, rounds=np.ones(len(deltas), dtype=np.int64))


def sent(transform: Transform, updates: Updates, draws: Draws = DRAWS) -> Updates:
    """What leaves the clients on their first visit."""
    plan = Plan(1, {name: delta[0] for name, delta in updates.dense.items()}, LocalSettings(steps=1))
    state = {name: np.zeros((len(updates), *s), dtype=np.float32) for name, s in transform.state(plan).items()}
    return transform.on_client(updates, state, draws)[0]


def test_places_and_quantised_values_by_hand() -> None:
    both = Chain(TopK(density=0.5), Quantize(bits=4, rounding="nearest"))
    message = sent(both, of([[1.0, -7.0, 3.6, 0.5]]))
    part = message.encoded["w"]
    head, scale = bytes([BITMAP, 2, 0, 0, 0, 0b0110]), np.array([7.0], dtype="<f4").tobytes()
    assert part.codec == "quantize4 of top_k"
    assert part.part(0).tobytes() == head + scale + bytes([0 | (4 + 7) << 4])  # -7 and 4 of 7, each plus 7
    assert both.decode(message).dense["w"].tolist() == [[0.0, -7.0, 4.0, 0.0]]


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([8, 4, 2, 1]),
    st.sampled_from([TopK(density=0.05), DGC(density=0.02), SelectiveSGD(upload=0.1, select="random")]),
    st.integers(1, 3000),
    st.integers(0, 99),
)
def test_the_places_are_the_sparsifiers_and_values_a_step_off_at_most(
    bits: Any, sparsifier: Any, size: int, seed: int
) -> None:
    updates = of(Draws(seed).normal("values", np.arange(2 * size)).reshape(2, size))
    both = Chain(sparsifier, Quantize(bits))
    wanted = sparsifier.decode(sent(sparsifier, updates, DRAWS.under("transforms.0"))).dense["w"]
    got = both.decode(sent(both, updates)).dense["w"]
    assert not np.any(got[wanted == 0])
    step = np.abs(wanted).max() * (2 if bits == 1 else 1 / (2 ** (bits - 1) - 1))
    assert np.abs(got - wanted).max() <= step + 1e-6


def test_quantised_values_are_right_on_average() -> None:
    both = Chain(TopK(density=0.5), Quantize(bits=2))
    got = both.decode(sent(both, of(np.tile([1.0, 0.0, -0.3, 0.0], (20_000, 1))))).dense["w"]
    # The deviation of the mean of 20,000 draws from a step of 1 is below 0.0036.
    np.testing.assert_allclose(got.mean(axis=0, dtype=np.float64), [1.0, 0.0, -0.3, 0.0], atol=0.015)


@pytest.mark.parametrize(("bits", "an_entry"), [(8, 1.0), (4, 0.5), (1, 0.125)])
def test_a_value_takes_its_bits_and_its_place(bits: Any, an_entry: float) -> None:
    updates = of(Draws(1).normal("values", np.arange(100_000))[None])
    alone, both = sent(DGC(density=0.01), updates), sent(Chain(DGC(density=0.01), Quantize(bits)), updates)
    assert alone.sizes[0] - both.sizes[0] == 1000 * (4 - an_entry) - 2 * 4, "two buckets have a scale each"


def test_a_code_that_there_is_not_is_refused_in_a_sparse_message() -> None:
    both = Chain(TopK(density=0.5), Quantize(bits=2))
    message = sent(both, of([[1.0, 1.0, 0.0, 0.0]]))
    spoilt = message.encoded["w"].payload.copy()
    spoilt[-1] = 0xFF
    with pytest.raises(UpdateError, match="a code of 2 bits is at most 2, and 3 came"):
        both.decode(replace(message, encoded={"w": replace(message.encoded["w"], payload=spoilt)}))


def test_values_that_are_not_as_many_as_the_places_are_refused() -> None:
    both = Chain(TopK(density=0.5), Quantize(bits=8))
    part = sent(both, of([[1.0, 1.0, 0.0, 0.0]])).encoded["w"]
    longer = Encoded.of(part.codec, part.shape, [part.part(0).tobytes() + b"more"])
    with pytest.raises(UpdateError, match="bytes in the codec 'quantize8'"):
        both.decode(replace(of([[0.0]]), dense={}, encoded={"w": longer}))


class TestDGCInEightBits(TransformPromises):
    make = staticmethod(lambda: Chain(DGC(density=0.1, warmup_rounds=3, rows=0.5), Quantize(bits=8)))


class TestTopKInOneBit(TransformPromises):
    make = staticmethod(lambda: Chain(TopK(density=0.3), Quantize(bits=1, rounding="nearest")))


class TestSelectiveInTwoBits(TransformPromises):
    make = staticmethod(lambda: Chain(SelectiveSGD(upload=0.3, select="random"), Quantize(bits=2)))
