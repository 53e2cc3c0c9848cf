"""Top-k, Deep Gradient Compression and Selective SGD: what is sent, what stays, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.testing import examples
from fedtower.core.testing.transform import TransformPromises
from fedtower.core.transform import Transform
from fedtower.core.updates import FloatArray, Updates
from fedtower.plugins.transforms.dgc import DGC
from fedtower.plugins.transforms.selective_sgd import SelectiveSGD
from fedtower.plugins.transforms.top_k import TopK


def of(values: list[list[float]], round: int = 1) -> Updates:
    """Clients with one parameter ``w``."""
    deltas = np.array(values, dtype=np.float32)
    ids = np.arange(len(values), dtype=np.int64)
    return Updates(np.ones(len(values)), {"w": deltas}, clients=ids, rounds=np.full(len(values), round))


def visits(transform: Transform, *given: list[list[float]]) -> tuple[list[list[list[float]]], dict[str, Any]]:
    """What the server sees of each visit, and what stays after the last."""
    shape = np.shape(given[0])[1:]
    plan = Plan(1, {"w": np.zeros(shape, dtype=np.float32)}, LocalSettings(steps=1))
    state: Any = {n: np.zeros((len(given[0]), *s), dtype=np.float32) for n, s in transform.state(plan).items()}
    seen = []
    for round, values in enumerate(given, 1):
        sent, state = transform.on_client(of(values, round), state, Draws(1))
        seen.append(transform.decode(sent).dense["w"].tolist())
    return seen, {name: value.tolist() for name, value in state.items()}


def test_top_k_sends_the_largest_and_remembers_the_rest() -> None:
    seen, kept = visits(TopK(density=0.5), [[3.0, -4.0, 2.0, 1.0]], [[0.0, 0.0, 0.0, 5.0]])
    assert seen == [[[3.0, -4.0, 0.0, 0.0]], [[0.0, 0.0, 2.0, 6.0]]]
    assert kept == {"w": [[0.0, 0.0, 0.0, 0.0]]}


def test_without_feedback_the_rest_is_lost() -> None:
    seen, kept = visits(TopK(density=0.25, feedback=False), [[3.0, -4.0, 2.0, 1.0]], [[0.0, 0.0, 0.0, 5.0]])
    assert seen == [[[0.0, -4.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 5.0]]]
    assert kept == {}


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 1.0), st.integers(0, 1000), st.integers(1, 5))
def test_what_top_k_sent_and_keeps_is_all_there_was(density: float, seed: int, rounds: int) -> None:
    top_k = TopK(density=density)
    state: Any = {n: np.zeros((3, *s), dtype=np.float32) for n, s in top_k.state(examples.plan()).items()}
    sums: dict[str, FloatArray] = {name: np.zeros_like(value) for name, value in state.items()}
    whole = {name: np.zeros_like(value) for name, value in state.items()}
    for round in range(1, rounds + 1):
        updates = examples.updates(3, round=round, seed=seed + round)
        sent, state = top_k.on_client(updates, state, Draws(1))
        for name, delta in top_k.decode(sent).dense.items():
            sums[name] += delta
            whole[name] += updates.dense[name]
    for name, kept in state.items():
        np.testing.assert_allclose(sums[name] + kept, whole[name], rtol=1e-5, atol=1e-5)


def test_dgc_by_hand() -> None:
    # u = (8, 4), v = (8, 4): the first is sent. Then u = (0, 2) + (1, 0), v = (1, 4 + 2): the second is.
    seen, kept = visits(DGC(density=0.5, momentum=0.5), [[8.0, 4.0]], [[1.0, 0.0]])
    assert seen == [[[8.0, 0.0]], [[0.0, 6.0]]]
    assert kept == {"momentum/w": [[1.0, 0.0]], "velocity/w": [[1.0, 0.0]]}


def test_dgc_without_momentum_is_top_k_with_feedback() -> None:
    given = [[[3.0, -4.0, 2.0, 1.0], [1.0, 1.5, 0.1, 0.2]], [[0.0, 0.5, 0.3, 5.0], [0.0, 0.25, 0.0, 0.0]]]
    assert visits(DGC(density=0.25, momentum=0.0), *given)[0] == visits(TopK(density=0.25), *given)[0]


def test_momentum_goes_on_until_an_entry_is_sent() -> None:
    # What waits a round has grown by its momentum when it is sent, and what was sent has none left.
    seen, _ = visits(DGC(density=0.5, momentum=0.9), [[1.0, -2.0]], [[0.0, 0.0]], [[0.0, 0.0]])
    np.testing.assert_allclose(seen, [[[0.0, -2.0]], [[1.9, 0.0]], [[0.0, 0.0]]], rtol=1e-6)
    sent, kept = visits(DGC(density=1.0, momentum=0.5), [[1.0, -2.0]])
    assert sent == [[[1.0, -2.0]]]
    assert kept["momentum/w"] == [[0.0, 0.0]], "momentum is masked where it was sent"


def test_dgc_clips_what_a_client_adds_and_not_what_it_has() -> None:
    seen, _ = visits(DGC(density=0.5, momentum=0.0, clip_norm=1.0), [[3.0, 4.0], [0.3, 0.4]], [[3.0, 0.0], [0.0, 0.4]])
    np.testing.assert_allclose(seen[0], [[0.0, 0.8], [0.0, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(seen[1], [[1.6, 0.0], [0.0, 0.4]], rtol=1e-6)


def test_dgc_takes_the_largest_of_each_parameter_or_of_all() -> None:
    dense = {"a": np.array([[1.0, -9.0]], dtype=np.float32), "b": np.array([[7.0, 8.0, 2.0]], dtype=np.float32)}
    updates = replace(of([[1.0]]), dense=dense)
    state = {f"{kept}/{name}": np.zeros_like(d) for name, d in dense.items() for kept in ("momentum", "velocity")}
    for dgc, want in (
        (DGC(density=0.3, momentum=0.0), ([0.0, -9.0], [0.0, 8.0, 0.0])),
        (DGC(density=0.6, momentum=0.0, among="all"), ([0.0, -9.0], [7.0, 8.0, 0.0])),
    ):
        sent, kept = dgc.on_client(updates, state, Draws(1))
        seen = dgc.decode(sent).dense
        assert (seen["a"][0].tolist(), seen["b"][0].tolist()) == want
        for name, delta in dense.items():
            np.testing.assert_array_equal(seen[name] + kept[f"velocity/{name}"], delta)


def test_dgc_warms_up_from_a_quarter() -> None:
    dgc = DGC(density=0.01, momentum=0.0, warmup_rounds=2)
    state = {f"{n}/w": np.zeros((1, 1000), dtype=np.float32) for n in ("momentum", "velocity")}
    counts = [
        np.count_nonzero(
            dgc.decode(dgc.on_client(of([[float(i) for i in range(1, 1001)]], r), state, Draws(1))[0]).dense["w"]
        )
        for r in (1, 2, 3, 9)
    ]
    assert counts == [250, 50, 10, 10]


def test_selective_sgd_takes_the_largest_of_all_parameters_together_and_cuts_them() -> None:
    updates = replace(
        of([[1.0, -9.0]]),
        dense={"a": np.array([[1.0, -9.0]], dtype=np.float32), "b": np.array([[8.0, 2.0]], dtype=np.float32)},
    )
    for bound, want in ((None, ([0.0, -9.0], [8.0, 0.0])), (0.5, ([0.0, -0.5], [0.5, 0.0]))):
        sgd = SelectiveSGD(upload=0.5, bound=bound)
        seen = sgd.decode(sgd.on_client(updates, {}, Draws(1))[0]).dense
        assert (seen["a"][0].tolist(), seen["b"][0].tolist()) == want


def test_selective_sgd_above_a_threshold_and_at_random() -> None:
    values = [[0.5 if i % 4 else 2.0 for i in range(400)]]
    (above,), _ = visits(SelectiveSGD(upload=0.1, select="threshold", threshold=1.0), values)
    assert np.count_nonzero(above) == 40
    assert set(np.unique(above)) == {0.0, 2.0}
    (few,), _ = visits(SelectiveSGD(upload=0.9, select="threshold", threshold=1.0), values)
    assert np.count_nonzero(few) == 100, "no more than are above it"
    first, second = visits(SelectiveSGD(upload=0.1, select="random"), values, values)[0]
    assert np.count_nonzero(first) == np.count_nonzero(second) == 40
    assert first != second, "another round, another choice"
    assert 0.1 < np.mean(np.array(first)[np.array(first) != 0] > 1) < 0.45, "a quarter of the values are large"


@pytest.mark.parametrize(
    ("make", "density", "least"),
    [(lambda: TopK(density=0.001), 0.001, 400), (lambda: DGC(density=0.001), 0.001, 400), (SelectiveSGD, 0.1, 6)],
)
def test_bytes_that_are_counted_are_few(make: Any, density: float, least: float) -> None:
    values = Draws(1).normal("values", np.arange(100_000)).astype(np.float32)[None]
    updates = replace(of([[0.0]]), dense={"w": values})
    transform = make()
    plan = Plan(1, {"w": values[0]}, LocalSettings(steps=1))
    state = {name: np.zeros((1, *shape), dtype=np.float32) for name, shape in transform.state(plan).items()}
    sent, _ = transform.on_client(updates, state, Draws(1))
    assert np.count_nonzero(transform.decode(sent).dense["w"]) == round(100_000 * density)
    assert updates.nbytes / sent.nbytes > least


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(density=0.0), "top_k's density must be above 0"),
        (lambda: TopK(density=0.5, rows=1.5), "top_k's rows"),
        (lambda: DGC(momentum=1.0), "below 1, not 1.0"),
        (lambda: DGC(clip_norm=-1.0), "clip_norm must be positive"),
        (lambda: DGC(warmup_rounds=-1), "warmup_rounds"),
        (lambda: SelectiveSGD(upload=2.0), "selective_sgd's upload"),
        (lambda: SelectiveSGD(bound=0.0), "bound must be positive"),
        (lambda: SelectiveSGD(select="threshold"), "needs a threshold above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


class TestTopKOfRowsToo(TransformPromises):
    make = staticmethod(lambda: TopK(density=0.3, rows=0.5))


class TestDGCWarmAndClipped(TransformPromises):
    make = staticmethod(lambda: DGC(density=0.1, clip_norm=0.5, warmup_rounds=3, rows=0.5))


class TestDGCAmongAll(TransformPromises):
    make = staticmethod(lambda: DGC(density=0.1, among="all", warmup_rounds=3))


class TestSelectiveAtRandom(TransformPromises):
    make = staticmethod(lambda: SelectiveSGD(upload=0.3, select="random", bound=0.1))


class TestSelectiveAboveAThreshold(TransformPromises):
    make = staticmethod(lambda: SelectiveSGD(upload=0.3, select="threshold", threshold=0.5))
