"""Checking: of a whole block just the clients at fault are refused, each for the first reason that is true of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.aggregation import GRID, LIMIT, GridSum
from fedtower.core.checking import WORDS, CheckSettings, Leased, Reason, check
from fedtower.core.cohort import Cohort
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import RowIds
from fedtower.core.updates import Rows, Updates

law = settings(deadline=None, max_examples=60)

# What 1,024 clients may say: a weight and a delta.
sendings = st.lists(
    st.tuples(
        st.floats(0, 1e12, allow_subnormal=False), st.floats(-(2.0**66), 2.0**66, width=32, allow_subnormal=False)
    ),
    min_size=1,
    max_size=64,
).map(lambda some: (some * 1024)[:1024])

PLAN = Plan(3, {"w": np.zeros(2, dtype=np.float32)}, LocalSettings(steps=1))
COHORT = Cohort(3, np.array([4, 5, 6]), 9)
LEASED = {"item": Leased(RowIds(np.array([0, 2, 3, 3]), np.array([0, 7, 1])), width=1)}


def block(w: list[list[float]], ids: list[list[int]] | None = None) -> Updates:
    """The clients 4, 5 and 6 with these deltas, and these rows, all of whose deltas are 1."""
    held = [[0, 7], [1], []] if ids is None else ids
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in held])]).astype(np.int64)
    rows = Rows(
        offsets,
        np.array([row for each in held for row in each], dtype=np.int64),
        np.ones((offsets[-1], 1), dtype=np.float32),
    )
    clients = np.array([4, 5, 6], dtype=np.int64)
    return Updates(np.ones(3), {"w": np.array(w, dtype=np.float32)}, {"item": rows}, clients, np.full(3, 3))


GOOD = block([[1, 2], [0, 0], [3, 4]])


def verdict(update: Updates, **bounds: float) -> list[Reason | None]:
    return check(update, PLAN, COHORT, CheckSettings(**bounds), LEASED)  # type: ignore[arg-type]


def test_what_is_as_it_should_be_is_not_refused() -> None:
    assert verdict(GOOD) == [None] * 3
    assert check(GOOD.pick(np.zeros(0, dtype=np.int64)), PLAN, COHORT, CheckSettings()) == []


@pytest.mark.parametrize(
    ("ids", "refused"),
    [
        ([[0, 7], [7], []], [None, Reason.ROW_NOT_LEASED, None]),  # it was given to another one
        ([[0, 7], [1], [0]], [None, None, Reason.ROW_NOT_LEASED]),
        ([[7, 0], [], []], [None, None, None]),  # the order is free, and so is how many are sent
        ([[7, 0, 7], [1, 1], []], [Reason.ROW_REPEATED, Reason.ROW_REPEATED, None]),
        ([[8], [-1], [2**62]], [Reason.ROW_NOT_LEASED] * 3),
    ],
)
def test_rows_are_those_that_each_client_was_given(ids: list[list[int]], refused: list[Reason | None]) -> None:
    assert verdict(block([[0, 0]] * 3, ids)) == refused


def test_where_leases_are_not_known_rows_are_distinct_and_not_negative() -> None:
    rows = block([[0, 0]] * 3, [[5, 9], [3, 3], [-1]])
    assert check(rows, PLAN, COHORT, CheckSettings()) == [None, Reason.ROW_REPEATED, Reason.ROW_NOT_LEASED]


def test_rows_that_nobody_asked_for_are_refused() -> None:
    asked = replace(PLAN, train_rows=False)
    assert check(GOOD, asked, COHORT, CheckSettings(), LEASED) == [Reason.WRONG_NAMES] * 3
    assert check(replace(GOOD, rows={}), asked, COHORT, CheckSettings(), LEASED) == [None] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beside", [0.5, 1e3])
def test_only_who_is_not_finite_is_refused(bad: float, beside: float) -> None:
    wanted = [None, Reason.NOT_FINITE, None]
    assert verdict(block([[beside, 0], [bad, 1], [0, 0]])) == wanted
    rows = replace(GOOD.rows["item"], row_deltas=np.array([[beside], [0], [bad]], dtype=np.float32))
    assert verdict(replace(GOOD, rows={"item": rows})) == wanted


def test_the_norm_is_one_over_everything_and_a_bound_may_be_reached() -> None:
    # Client 4: 1 + 4 + two rows of 1; client 5: one row of 1; client 6: 9 + 16.
    assert verdict(GOOD, max_norm=math.sqrt(7)) == [None, None, Reason.NORM]
    assert verdict(GOOD, max_norm=2.6) == [Reason.NORM, None, Reason.NORM]
    assert verdict(GOOD, max_norm=5.0) == [None] * 3


def test_examples_are_bounded() -> None:
    assert verdict(replace(GOOD, weights=np.array([9.0, 10.0, 11.0])), max_examples=10) == [
        None,
        None,
        Reason.NUM_EXAMPLES,
    ]


@given(sendings)
@law
def test_what_is_not_too_large_can_always_be_summed(sent: list[tuple[float, float]]) -> None:
    clients = np.arange(len(sent), dtype=np.int64)
    weights, deltas = (np.array(column) for column in zip(*sent, strict=True))
    updates = Updates(weights, {"w": np.stack([deltas, deltas], axis=1).astype(np.float32)}, {}, clients)
    reasons = check(updates, PLAN, Cohort(3, clients, 1024), CheckSettings())
    left = np.flatnonzero([reason is None for reason in reasons])
    total = GridSum()
    total.add(updates.pick(left), weights[left])
    assert set(reasons) <= {None, Reason.TOO_LARGE}


def test_one_client_alone_may_fill_half_of_the_range() -> None:
    alone = Cohort(3, np.array([4]), 9)
    for delta, refused in ((LIMIT * GRID / 2, None), (LIMIT * GRID, Reason.TOO_LARGE)):
        update = replace(GOOD.slice(0, 1), dense={"w": np.full((1, 2), delta, dtype=np.float32)})
        assert check(update, PLAN, alone, CheckSettings()) == [refused]


CHANGES: dict[str, tuple[Reason, Callable[[Updates], NDArray[np.float64] | NDArray[np.int64]]]] = {
    "weights": (Reason.WEIGHT, lambda update: np.array([math.inf, 1.0, 1.0])),
    "clients": (Reason.NOT_ASKED, lambda update: np.array([3, 5, 6])),
    "rounds": (Reason.OTHER_ROUND, lambda update: np.array([2, 3, 3])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_who_is_at_fault_is_refused_and_the_first_reason_is_said(name: str) -> None:
    reason, changed = CHANGES[name]
    update = replace(GOOD, **{name: changed(GOOD)})  # type: ignore[arg-type]
    assert verdict(update) == [reason, None, None]
    both = replace(update, dense={"w": np.array([[math.nan, 0], [0, 0], [0, 0]], dtype=np.float32)})
    assert verdict(both) == [reason, None, None]


def test_every_reason_has_its_words() -> None:
    assert set(WORDS) == set(Reason)
