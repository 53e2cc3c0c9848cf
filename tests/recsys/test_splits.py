from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, LeakError, RecipeError
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.population import Events, HeldOut
from fedtower.recsys.splits import TEST, TRAIN, VALIDATION, SplitParts, check_split, make_split
from fedtower.recsys.vocabulary import Vocabulary

Rows = list[tuple[int, int, int]]  # client, item, time

DRAWS = Draws(3)
rows_of_data = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 6)), min_size=6, max_size=80)


def table(rows: Rows, ranks: bool = False) -> EventTable:
    columns: NDArray[np.int64] = np.array(rows, dtype=np.int64).T
    return EventTable.build(
        "a table",
        users=Vocabulary(np.arange(6, dtype=np.int64), "user"),
        items=Vocabulary(np.arange(10, dtype=np.int64), "item"),
        client_rows=columns[0],
        item_rows=columns[1],
        times=columns[2],
        times_are_ranks=ranks,
    )


def with_given_split(population: EventTable) -> EventTable:
    """Each client's first event is the given test item, and three others the negatives."""
    events = population.events(np.arange(6))
    items = np.full(6, -1, dtype=np.int64)
    some = events.lengths > 0
    items[some] = events.items[events.offsets[:-1][some]]
    return replace(population, given=HeldOut(events.clients, items, np.tile([7, 8, 9], (6, 1))))


def roles(population: EventTable, kind: str, *, validation: bool = True) -> tuple[Events, NDArray[np.int8]]:
    events = population.events(np.arange(6))
    split = make_split(kind, population, validation=validation, test_fraction=0.3, draws=DRAWS)
    return events, split.parts(events).role


@given(rows_of_data, st.sampled_from(["leave_one_out", "leave_two_out", "time", "random", "ncf"]), st.booleans())
def test_every_event_has_one_role_and_no_held_out_item_is_trained_on(rows: Rows, kind: str, validation: bool) -> None:
    events, role = roles(with_given_split(table(rows)), kind, validation=validation)
    assert set(role.tolist()) <= {TRAIN, VALIDATION, TEST}
    if not validation and kind != "leave_two_out":
        assert VALIDATION not in role
    for client in range(6):
        mine = events.owners == client
        trained = set(events.items[mine & (role == TRAIN)].tolist())
        held = events.items[mine & (role != TRAIN)].tolist()
        assert not trained & set(held)
        assert len(set(held)) == len(held)


@given(rows_of_data, st.sampled_from(["leave_one_out", "leave_two_out", "time", "random", "ncf"]))
def test_a_role_does_not_depend_on_the_block(rows: Rows, kind: str) -> None:
    population = with_given_split(table(rows))
    events, role = roles(population, kind)
    split = make_split(kind, population, validation=True, test_fraction=0.3, draws=DRAWS)
    for client in range(6):
        alone = split.parts(population.events(np.array([client]))).role
        assert alone.tolist() == role[events.owners == client].tolist()


@given(rows_of_data)
def test_the_last_events_are_held_out(rows: Rows) -> None:
    for kind, validation, ends in (
        ("leave_one_out", False, [TEST]),
        ("leave_one_out", True, [VALIDATION, TEST]),
        ("leave_two_out", False, [VALIDATION, TEST]),
    ):
        events, role = roles(table(rows), kind, validation=validation)
        for client in range(6):
            mine = role[events.owners == client].tolist()
            whole = len(mine) > len(ends)
            assert mine == ([TRAIN] * (len(mine) - len(ends)) + ends if whole else [TRAIN] * len(mine))


@given(rows_of_data)
def test_nothing_in_training_is_later_than_what_a_time_split_holds_out(rows: Rows) -> None:
    events, role = roles(table(rows), "time")
    latest = events.times[role == TRAIN].max(initial=-1)
    assert (events.times[role == VALIDATION] > latest).all()
    assert (events.times[role == TEST] > events.times[role != TEST].max(initial=-1)).all()
    assert (role == TEST).mean() <= 0.3


def test_a_random_split_has_about_its_fractions() -> None:
    rows = [(client, item, 0) for client in range(6) for item in range(10)]
    many = np.array([roles_of_seed(table(rows), seed) for seed in range(60)])
    assert abs((many == TEST).mean() - 0.3) < 0.02
    assert abs((many == VALIDATION).mean() - 0.3) < 0.02


def roles_of_seed(population: EventTable, seed: int) -> NDArray[np.int8]:
    split = make_split("random", population, validation=True, test_fraction=0.3, draws=Draws(seed))
    return split.parts(population.events(np.arange(6))).role


def test_a_short_history_stays_whole_in_training() -> None:
    population = table([(0, item, item) for item in range(5)] + [(1, 0, 0), (1, 1, 1)])
    split = make_split("leave_one_out", population, validation=False, draws=DRAWS, min_events=3)
    assert split.parts(population.events(np.array([1, 0]))).role.tolist() == [0, 0, 0, 0, 0, 0, TEST]


def test_a_given_test_item_is_the_test_item_wherever_it_stands() -> None:
    population = with_given_split(table([(0, item, item) for item in range(5)] + [(1, 3, 0)]))
    assert roles(population, "ncf", validation=False)[1].tolist() == [TEST, 0, 0, 0, 0, TEST]
    assert roles(population, "ncf", validation=True)[1].tolist() == [TEST, 0, 0, 0, VALIDATION, TEST]


def test_a_given_test_item_that_its_user_never_touched_is_refused() -> None:
    population = with_given_split(table([(0, 1, 0), (0, 2, 1)]))
    assert population.given is not None
    population.given.items[0] = 9
    with pytest.raises(DataError, match=r"test item of user 0 .item 9. is not among that user's events"):
        roles(population, "ncf")


def test_a_planted_test_item_is_caught() -> None:
    # No table lets the item 4 come twice: this is what a broken data set's plugin would hand over.
    events = Events(
        np.array([70, 71]), np.array([0, 3, 7]), np.array([4, 2, 3, 4, 5, 6, 4]), np.arange(7), np.ones(7, np.float32)
    )
    split = make_split("leave_one_out", table([(0, 0, 0)]), validation=False, draws=DRAWS)
    with pytest.raises(LeakError, match=r"item row 4 is held out for client 71 and is there again among .* training"):
        split.parts(events)


def test_an_item_held_out_twice_is_caught() -> None:
    events = Events(np.array([5]), np.array([0, 3]), np.array([1, 4, 4]), np.arange(3), np.ones(3, np.float32))
    with pytest.raises(LeakError, match=r"item row 4 is held out for client 5 and is there again among .* held-out"):
        check_split(events, SplitParts(np.array([TRAIN, VALIDATION, TEST], dtype=np.int8)))


def test_another_clients_held_out_item_is_no_leak() -> None:
    events = Events(np.array([0, 1]), np.array([0, 2, 4]), np.array([1, 2, 2, 1]), np.arange(4), np.ones(4, np.float32))
    check_split(events, SplitParts(np.array([TRAIN, TEST, TRAIN, TEST], dtype=np.int8)))


def test_a_split_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'leave_one_uot' is not a split .did you mean 'leave_one_out'"):
        make_split("leave_one_uot", table([(0, 0, 0)]), validation=False, draws=DRAWS)


@pytest.mark.parametrize(("fraction", "validation"), [(0.0, False), (1.0, False), (0.5, True), (-0.1, False)])
@pytest.mark.parametrize("kind", ["time", "random"])
def test_a_fraction_that_leaves_nothing_is_refused(kind: str, fraction: float, validation: bool) -> None:
    with pytest.raises(RecipeError, match="leaves nothing to train on or nothing to test"):
        make_split(kind, table([(0, 0, 0)]), validation=validation, test_fraction=fraction, draws=DRAWS)


def test_a_time_split_needs_a_clock() -> None:
    with pytest.raises(DataError, match="'time' needs real times, but the times of 'a table' only order"):
        make_split("time", table([(0, 0, 0)], ranks=True), validation=False, draws=DRAWS)


def test_a_given_split_needs_one() -> None:
    with pytest.raises(DataError, match="'a table' has none"):
        make_split("ncf", table([(0, 0, 0)]), validation=False, draws=DRAWS)
