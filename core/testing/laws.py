"""Laws of folding and of the server's step, over generated cohorts and deltas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtower.core.server import Parameters, ServerOptimizer
from fedtower.core.testing import examples
from fedtower.core.testing.promises import assert_close, assert_same_bits
from fedtower.core.updates import Rows, Updates

Fold = Callable[..., Updates]
"""``fold(*blocks, root=None)``."""

SEEDS = st.integers(0, 10_000)
MAGNITUDES = st.sampled_from([1e-3, 1.0, 1e3])


def _law(law: Callable[..., None]) -> Callable[..., None]:
    """The same cases every time, whoever is tried."""
    return settings(
        max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )(law)


def _cohorts(rows: bool) -> st.SearchStrategy[Updates]:
    """One to nine clients with deltas of any magnitude."""

    def made(clients: int, seed: int, magnitude: float) -> Updates:
        cohort = examples.updates(clients, rows=rows, seed=seed)
        return cohort.scaled(np.full(clients, magnitude))

    return st.builds(made, st.integers(1, 9), SEEDS, MAGNITUDES)


def order_and_width_change_no_bit(fold: Fold, rows: bool) -> None:
    """Clients may come in any order, in blocks of any width, empty ones among them."""

    @_law
    @given(_cohorts(rows), st.data())
    def law(cohort: Updates, data: st.DataObject) -> None:
        count = len(cohort)
        order = data.draw(st.permutations(range(count)))
        cuts = data.draw(st.lists(st.integers(0, count), max_size=4))
        mixed = cohort.pick(np.array(order))
        edges = sorted([0, *cuts, count])
        assert_same_bits(fold(*(mixed.slice(*edge) for edge in pairwise(edges))), fold(cohort))

    law()


def a_scale_is_followed(fold: Fold, rows: bool) -> None:
    """Deltas that are twice as long make a total that is."""

    @_law
    @given(_cohorts(rows), st.sampled_from([0.125, 2.0, 16.0]), SEEDS)
    def law(cohort: Updates, factor: float, seed: int) -> None:
        root = examples.updates(1, rows=rows, seed=seed)
        longer = fold(cohort.scaled(np.full(len(cohort), factor)), root=root.scaled(np.array([factor])))
        assert_close(longer, fold(cohort, root=root).scaled(np.array([factor])), rtol=1e-4, atol=1e-5)

    law()


def one_client_is_returned(fold: Fold, rows: bool) -> None:
    """Whoever is alone, and whatever she weighs, is not contradicted."""

    @_law
    @given(_cohorts(rows), st.integers(0, 8))
    def law(cohort: Updates, place: int) -> None:
        alone = cohort.pick(np.array([place % len(cohort)]))
        total = fold(alone, root=alone)
        assert_close(dict(total.dense), dict(alone.dense), rtol=1e-4)
        for table, part in total.rows.items():
            assert_close(part.row_ids, alone.rows[table].row_ids)
            assert_close(part.row_deltas, alone.rows[table].row_deltas, rtol=1e-4)

    law()


def a_row_is_folded_as_a_parameter_is(fold: Fold) -> None:
    """What everybody says of one row comes to what the same numbers come to as a shared parameter."""

    @_law
    @given(_cohorts(False), SEEDS)
    def law(cohort: Updates, seed: int) -> None:
        root = examples.updates(1, rows=False, seed=seed)
        dense = fold(_as_parameter(cohort), root=_as_parameter(root))
        sparse = fold(_as_row(cohort), root=_as_row(root))
        assert "item" in sparse.rows, "the rows of 'item' are not in the total"
        part, wanted = sparse.rows["item"], dense.dense["p"]
        assert_close(sparse.weights, dense.weights)
        if len(part.row_ids) or np.any(wanted):  # a total of nothing may leave the row out
            assert part.row_ids.tolist() == [7]
            assert_close(part.row_deltas, wanted)

    law()


def _as_parameter(cohort: Updates) -> Updates:
    return replace(cohort, dense={"p": cohort.dense["tower.bias"]})


def _as_row(cohort: Updates) -> Updates:
    offsets, ids = np.arange(len(cohort) + 1, dtype=np.int64), np.full(len(cohort), 7, dtype=np.int64)
    return replace(cohort, dense={}, rows={"item": Rows(offsets, ids, cohort.dense["tower.bias"])})


def twice_the_rate_is_twice_the_step(make: Callable[[], ServerOptimizer]) -> None:
    """The rate is a factor of the step, at the first step and later."""

    @_law
    @given(SEEDS, MAGNITUDES)
    def law(seed: int, magnitude: float) -> None:
        parameters, deltas = _walk(seed, magnitude)
        optimizer, zeros = make(), {name: np.zeros_like(value) for name, value in parameters.items()}
        _, state = optimizer.update(zeros, deltas[0], optimizer.init(zeros), 0.1)
        once, _ = optimizer.update(zeros, deltas[1], state, 0.25)
        twice, _ = optimizer.update(zeros, deltas[1], state, 0.5)
        assert_close(dict(twice), {name: 2 * value for name, value in once.items()}, rtol=1e-4, atol=1e-6 * magnitude)

    law()


def names_say_nothing(make: Callable[[], ServerOptimizer]) -> None:
    """The order in which parameters stand changes no bit."""

    @_law
    @given(SEEDS, MAGNITUDES)
    def law(seed: int, magnitude: float) -> None:
        parameters, deltas = _walk(seed, magnitude)
        one, other = make(), make()
        state, turned = one.init(parameters), other.init(_reversed(parameters))
        after, mirrored = parameters, _reversed(parameters)
        for delta in deltas:
            after, state = one.update(after, delta, state, 0.1)
            mirrored, turned = other.update(mirrored, _reversed(delta), turned, 0.1)
        assert_same_bits(dict(after), dict(mirrored))

    law()


def every_step_is_finite(make: Callable[[], ServerOptimizer]) -> None:
    """Deltas of one millionth and of a million, and none at all, one after another."""

    @_law
    @given(SEEDS, st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1e6]), min_size=1, max_size=6))
    def law(seed: int, magnitudes: list[float]) -> None:
        parameters, deltas = _walk(seed, 1.0)
        optimizer = make()
        state = optimizer.init(parameters)
        for magnitude in magnitudes:
            delta = {name: value * np.float32(magnitude) for name, value in deltas[0].items()}
            parameters, state = optimizer.update(parameters, delta, state, 0.1)
            assert all(np.all(np.isfinite(value)) for value in [*parameters.values(), *state.values()])

    law()


def _walk(seed: int, magnitude: float) -> tuple[Parameters, list[Parameters]]:
    """Parameters, and the deltas of three rounds."""
    deltas = [
        {
            name: np.asarray(value * np.float32(magnitude))
            for name, value in examples.plan(seed=seed + k).parameters.items()
        }
        for k in range(1, 4)
    ]
    return examples.plan(seed=seed).parameters, list(deltas)


def _reversed(parameters: Parameters) -> Parameters:
    return {name: parameters[name] for name in reversed(list(parameters))}
