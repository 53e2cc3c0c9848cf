import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtower.core.errors import DataError
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.history import histories
from fedtower.recsys.population import DataCard, Events, blocks
from fedtower.recsys.vocabulary import Vocabulary

Rows = list[tuple[int, int, int]]  # client, item, time, in the order of the file

rows_of_data = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 4)), min_size=1, max_size=60)


def table(rows: Rows) -> EventTable:
    columns: NDArray[np.int64] = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return EventTable.build(
        "a table",
        users=Vocabulary(np.arange(6, dtype=np.int64), "user"),
        items=Vocabulary(np.arange(8, dtype=np.int64), "item"),
        client_rows=columns[0],
        item_rows=columns[1],
        times=columns[2],
    )


def of_client(events: Events, place: int) -> list[tuple[int, int]]:
    part = slice(*events.offsets[place : place + 2])
    return list(zip(events.items[part].tolist(), events.times[part].tolist(), strict=True))


def by_hand(rows: Rows, client: int) -> list[tuple[int, int]]:
    """What a client's events must be: sorted by time, then one of each item, the last."""
    mine = sorted(((item, time) for owner, item, time in rows if owner == client), key=lambda event: event[1])
    return [event for place, event in enumerate(mine) if event[0] not in [item for item, _ in mine[place + 1 :]]]


@given(rows_of_data)
def test_events_are_in_time_order_and_the_last_of_a_pair_stays(rows: Rows) -> None:
    events = table(rows).events(np.arange(6))
    assert [of_client(events, client) for client in range(6)] == [by_hand(rows, client) for client in range(6)]


@given(rows_of_data, st.lists(st.integers(0, 5), max_size=6))
def test_who_else_is_asked_for_does_not_matter(rows: Rows, clients: list[int]) -> None:
    events = table(rows).events(np.array(clients, dtype=np.int64))
    assert [of_client(events, place) for place in range(len(clients))] == [by_hand(rows, client) for client in clients]
    assert events.owners.tolist() == [p for p, client in enumerate(clients) for _ in by_hand(rows, client)]
    assert events.positions.tolist() == [e for client in clients for e in range(len(by_hand(rows, client)))]


@given(rows_of_data, st.data())
def test_a_history_holds_only_earlier_usable_events(rows: Rows, data: st.DataObject) -> None:
    events = table(rows).events(np.arange(6))
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(events.items), max_size=len(events.items))), bool)
    owners, cut = events.owners, events.positions  # every event is a target once
    length = data.draw(st.integers(1, 5))
    seen = histories(events, usable, owners, cut, length)
    for target in range(len(events.items)):
        start = int(events.offsets[owners[target]])
        before = [int(events.items[e]) for e in range(start, target) if usable[e]]
        assert seen.items[target][seen.mask[target]].tolist() == before[::-1][:length]
        assert not seen.items[target][~seen.mask[target]].any()
        assert events.items[target] not in seen.items[target][seen.mask[target]]


def test_a_cut_beyond_the_history_is_refused() -> None:
    events = table([(0, 1, 0)]).events(np.array([0]))
    with pytest.raises(ValueError, match="target 0 is cut at 2, but its client has 1 events"):
        histories(events, np.array([True]), np.array([0]), np.array([2]), length=3)


@pytest.mark.parametrize("stranger", [-1, 6])
def test_a_client_that_is_not_there_is_refused(stranger: int) -> None:
    population = table([(0, 1, 0)])
    with pytest.raises(IndexError, match=f"no client {stranger}: this data has the clients 0 to 5"):
        population.events(np.array([0, stranger]))


def test_a_table_without_interactions_is_refused() -> None:
    with pytest.raises(DataError, match="'a table' has no interactions"):
        table([])


def test_the_card_counts_what_is_kept() -> None:
    card = table([(0, 1, 86_400), (0, 1, 90_000), (1, 2, 0)]).card
    assert (card.users, card.items, card.interactions) == (6, 8, 2)
    assert card.density == 2 / 48
    assert card.to_dict()["first_time"] == "1970-01-01T00:00:00+00:00"
    assert card.to_dict()["last_time"] == "1970-01-02T01:00:00+00:00"
    assert card.extra == {"duplicates": "1 repeated user-item pairs left out, the last one of each kept"}


def test_a_card_of_nothing_has_no_density() -> None:
    assert DataCard("nothing", 0, 0, 0).density == 0.0


def test_blocks_cover_everybody_once() -> None:
    assert np.concatenate(list(blocks(10, 4))).tolist() == list(range(10))
    assert list(blocks(0, 4)) == []


@given(rows_of_data)
def test_times_may_be_of_any_size(rows: Rows) -> None:
    far = [(client, item, time << 60) for client, item, time in rows]
    near, apart = table(rows).events(np.arange(6)), table(far).events(np.arange(6))
    assert near.items.tolist() == apart.items.tolist()
    assert [time << 60 for time in near.times.tolist()] == apart.times.tolist()
