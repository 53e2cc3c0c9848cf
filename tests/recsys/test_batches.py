"""Batches: every target once an epoch, after its own history, and the same whoever else is visited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import Work
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys import batches
from fedtower.recsys.batches import SequenceData, span_of
from fedtower.recsys.event_table import EventTable
from fedtower.recsys.history import TRAIN, Population, make_split

PopulationOf = Callable[..., EventTable]

DRAWS = Draws(5)
ITEMS = 500
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)
locals_ = st.builds(
    LocalSettings,
    epochs=st.integers(1, 2),
    batch_size=st.integers(1, 9),
    negatives=st.integers(1, 5),
    history_length=st.integers(1, 12),
)


def some_population(population_of: PopulationOf, counts: list[int]) -> EventTable:
    """Clients with so many different items each; no two clients have the same history."""
    return population_of([DRAWS.permutation(ITEMS, "items", c)[:count] for c, count in enumerate(counts)], ITEMS)


def data_of(population: EventTable, kind: str = "leave_two_out") -> SequenceData:
    return SequenceData(population, make_split(kind, population, validation=True, draws=DRAWS), DRAWS)


def everyone(population: Population) -> Any:
    return np.arange(population.num_clients, dtype=np.int64)


def trained_items(data: SequenceData, client: int) -> list[int]:
    """The training events of a client, the slow way."""
    events = data.population.events(np.array([client]))
    return [int(item) for item, role in zip(events.items, data.split.parts(events).role, strict=True) if role == TRAIN]


def slots_of(work: Work, client: int, step: int, name: str = "history") -> list[int]:
    """The items in the slots of one step."""
    items = work.row_ids["item"].of(client)[work.slots[name][client, step]]
    return [int(item) for item in items]


def targets_of(work: Work, client: int, length: int) -> list[tuple[int, int, list[int]]]:
    """``(step, item, the items that are at most length slots before it)`` of every target with weight."""
    found = []
    for step in range(work.inputs["target"].shape[1]):
        slots = slots_of(work, client, step)
        for slot, weight in zip(work.inputs["target"][client, step], work.inputs["weight"][client, step], strict=True):
            if weight:
                found.append((step, slots[slot], slots[max(slot - length, 0) : slot]))
    return found


def test_three_events_by_hand(population_of: PopulationOf) -> None:
    data = data_of(population_of([[7, 3, 9, 1, 4]], ITEMS))  # 1 and 4 are held out
    work = data.work(Plan(1, {}, LocalSettings(steps=1, batch_size=4, negatives=2, history_length=2)), np.array([0]))
    assert slots_of(work, 0, 0) == [7, 3, 9, 9, 9, 9]  # four targets and two before them; beyond the end: the last
    assert sorted(work.inputs["target"][0, 0].tolist()) == [0, 0, 1, 2]
    assert sorted(targets_of(work, 0, length=2)) == [(0, 3, [7]), (0, 9, [7, 3])]
    assert (work.steps.tolist(), work.examples.tolist()) == ([1], [2])
    assert work.row_ids["item"].ids.tolist() == sorted({7, 3, 9, *slots_of(work, 0, 0, "negatives")})


@settings(deadline=None)
@given(lengths, locals_)
def test_an_epoch_takes_every_target_once(population_of: PopulationOf, counts: list[int], local: LocalSettings) -> None:
    data = data_of(some_population(population_of, counts))
    work = data.work(Plan(3, {}, local), everyone(data.population))
    for client in range(len(counts)):
        taken = Counter(item for _, item, _ in targets_of(work, client, local.history_length))
        assert taken == dict.fromkeys(trained_items(data, client)[1:], local.epochs)
        assert work.examples[client] == taken.total()


@settings(deadline=None)
@given(lengths, locals_)
def test_before_a_target_stand_exactly_the_events_before_it(
    population_of: PopulationOf, counts: list[int], local: LocalSettings
) -> None:
    data = data_of(some_population(population_of, counts))
    work = data.work(Plan(3, {}, local), everyone(data.population))
    for client in range(len(counts)):
        trained = trained_items(data, client)
        for _, item, before in targets_of(work, client, local.history_length):
            place = trained.index(item)
            assert before == trained[max(place - local.history_length, 0) : place]


@settings(deadline=None)
@given(lengths, locals_)
def test_the_targets_of_a_step_stand_in_one_stretch(
    population_of: PopulationOf, counts: list[int], local: LocalSettings
) -> None:
    data = data_of(some_population(population_of, counts))
    work = data.work(Plan(3, {}, local), everyone(data.population))
    assert work.slots["history"].shape[2] == span_of(local) + local.history_length
    for client in range(len(counts)):
        trained = trained_items(data, client)
        for step in range(int(work.steps[client])):
            places = [trained.index(item) for at, item, _ in targets_of(work, client, 0) if at == step]
            assert 1 <= len(places) <= local.batch_size
            assert max(places) - min(places) < span_of(local)


@settings(deadline=None)
@given(lengths, locals_)
def test_real_steps_come_first_and_padding_weighs_nothing(
    population_of: PopulationOf, counts: list[int], local: LocalSettings
) -> None:
    data = data_of(some_population(population_of, counts))
    work = data.work(Plan(3, {}, local), everyone(data.population))
    weight = work.inputs["weight"].sum(axis=2)
    for client in range(len(counts)):
        assert (weight[client, : work.steps[client]] > 0).all()
        assert not weight[client, work.steps[client] :].any()
    assert set(np.unique(work.inputs["weight"])) <= {0.0, 1.0}


@settings(deadline=None)
@given(lengths, locals_, st.randoms())
def test_a_client_gets_the_same_work_in_any_block(
    population_of: PopulationOf, counts: list[int], local: LocalSettings, random: Any
) -> None:
    data = data_of(some_population(population_of, counts))
    block = everyone(data.population)
    random.shuffle(block)
    together = data.work(Plan(3, {}, local), block)
    for place, client in enumerate(block):
        alone = data.work(Plan(3, {}, local), np.array([client]))
        steps = int(alone.steps[0])
        assert together.steps[place] == steps
        assert together.examples[place] == alone.examples[0]
        assert together.row_ids["item"].of(place).tolist() == alone.row_ids["item"].of(0).tolist()
        for given_to, kept in ((together.inputs, alone.inputs), (together.slots, alone.slots)):
            for name in kept:
                assert_same_bits(given_to[name][place, :steps], kept[name][0, :steps], name)


def test_a_client_without_events_asks_for_nobody_elses_rows(population_of: PopulationOf) -> None:
    data = data_of(population_of([[1, 2, 3, 4, 5], [], [6, 7, 8, 9, 10]], 200))
    work = data.work(Plan(1, {}, LocalSettings(steps=2, batch_size=2, negatives=3, history_length=4)), np.arange(3))
    assert work.row_ids["item"].of(1).tolist() == sorted(set(slots_of(work, 1, 0, "negatives")))
    assert work.steps.tolist() == [1, 0, 1]


@pytest.mark.parametrize(("events", "targets"), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1)])
def test_clients_with_hardly_an_event(population_of: PopulationOf, events: int, targets: int) -> None:
    # Of three or more the last two are held out, and the first is no target: nothing came before it.
    data = data_of(population_of([list(range(events)), [5, 6, 7, 8]], 200))
    work = data.work(Plan(1, {}, LocalSettings(epochs=1, batch_size=3, negatives=3, history_length=4)), np.arange(2))
    expected = {2: 1}.get(events, targets)  # two events are too few to hold anything out
    assert (work.examples[0], work.steps[0], work.examples[1]) == (expected, min(expected, 1), 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(-2, 2)), max_size=30), st.integers(0, 60))
def test_one_sort_of_words_is_the_sort_by_several_arrays(rows: list[tuple[int, int, int]], shift: int) -> None:
    # Few values far apart, or beside each other: where their leading bits are the same all bits decide.
    owner, stretch, key = np.array(sorted(rows, key=lambda row: row[:2]), dtype=np.int64).reshape(-1, 3).T
    key = key << shift
    assert batches._by_key_in_runs(key, owner, stretch).tolist() == np.lexsort((key, stretch, owner)).tolist()


def test_what_is_left_over_of_a_stretch_waits_for_the_full_batches(population_of: PopulationOf) -> None:
    # 27 targets in two stretches, of 14 and 13: batches of 8, 6, 8 and 5. Three targets make one batch of 3.
    data = data_of(population_of([list(range(30)), list(range(200, 206))], ITEMS))
    once = LocalSettings(steps=1, batch_size=8, negatives=1, history_length=14)
    for round in range(1, 30):
        assert data.work(Plan(round, {}, once), np.arange(2)).examples.tolist() == [8, 3]
        all_four = data.work(Plan(round, {}, replace(once, steps=4)), np.arange(1)).inputs["weight"].sum(axis=2)[0]
        assert sorted(all_four[:2].tolist()) == [8, 8]
        assert sorted(all_four[2:].tolist()) == [5, 6]


def test_visits_of_one_step_come_to_every_target(population_of: PopulationOf) -> None:
    # 39 targets in five stretches, of 8, 8, 8, 8 and 7: the one that fills no batch has its turn like the others.
    data = data_of(population_of([list(range(42))], ITEMS))
    local = LocalSettings(steps=1, batch_size=8, negatives=1, history_length=3)
    taken: Counter[int] = Counter()
    for round in range(1, 200):
        taken.update(item for _, item, _ in targets_of(data.work(Plan(round, {}, local), np.array([0])), 0, 3))
    assert set(taken) == set(range(1, 40))
    assert min(taken.values()) > 20  # 40 are expected, with a standard deviation of 5.6


def test_rounds_and_epochs_deal_other_batches(population_of: PopulationOf) -> None:
    # 57 targets in three stretches of 19, each in four batches.
    data = data_of(population_of([list(range(60))], ITEMS))
    local = LocalSettings(epochs=2, batch_size=5, negatives=1, history_length=20)
    dealt = []
    for round in (1, 2):
        work = data.work(Plan(round, {}, local), np.array([0]))
        batches = [{item for at, item, _ in targets_of(work, 0, 0) if at == step} for step in range(24)]
        dealt += [batches[:12], batches[12:]]
    assert all(sorted(set().union(*epoch)) == list(range(1, 58)) for epoch in dealt)
    together = [{frozenset(batch) for batch in epoch} for epoch in dealt]
    assert all(not one & other for one, other in combinations(together, 2))


def test_a_limit_on_steps_is_kept(population_of: PopulationOf) -> None:
    data = data_of(population_of([list(range(60)), list(range(5))], ITEMS))
    work = data.work(Plan(1, {}, LocalSettings(steps=3, batch_size=5, negatives=1, history_length=5)), np.arange(2))
    assert work.steps.tolist() == [3, 1]
    assert work.inputs["target"].shape == (2, 3, 5)


def test_user_features_come_along(population_of: PopulationOf) -> None:
    data = data_of(population_of([list(range(9))] * 3, ITEMS))
    work = data.work(Plan(1, {}, LocalSettings(steps=2, batch_size=2, negatives=1, history_length=5)), np.array([2, 0]))
    assert work.inputs["user"].tolist() == [[[2.0, 1.0]] * 2, [[0.0, 1.0]] * 2]


@settings(deadline=None)
@given(lengths, locals_, st.sampled_from(["leave_one_out", "leave_two_out", "time", "random"]))
def test_a_held_out_item_is_never_asked_for(
    population_of: PopulationOf, counts: list[int], local: LocalSettings, kind: str
) -> None:
    data = data_of(some_population(population_of, counts), kind)
    clients = everyone(data.population)
    work = data.work(Plan(2, {}, local), clients)
    events = data.population.events(clients)
    held = data.split.parts(events).role != TRAIN
    for client in clients:
        mine = set(events.items[held & (events.owners == client)].tolist())
        assert not mine & set(work.row_ids["item"].of(client).tolist())


def test_a_client_whose_every_event_is_held_out_is_no_leak(population_of: PopulationOf) -> None:
    # By time: the only event of client 1 is the newest of all, and its item the first that the next client learns from.
    population = population_of([[0, 1, 2, 3, 4, 5, 6], [0]], 50)
    split = make_split("time", population, validation=False, test_fraction=0.2, draws=DRAWS)
    local = LocalSettings(steps=1, batch_size=2, negatives=1, history_length=2)
    work = SequenceData(population, split, DRAWS).work(Plan(1, {}, local), np.array([1, 0]))
    assert work.steps.tolist() == [0, 1]
    assert 0 not in work.row_ids["item"].of(0)
