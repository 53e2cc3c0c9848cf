"""Labelled examples as batches: who trains on which example in which round, and what padding may not do."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.core.errors import DataError, RecipeError
from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.runtime import Work
from fedtower.core.testing.promises import assert_same_bits
from fedtower.recsys.examples import ExampleCard, ExampleData, Examples, ExampleSet, ExampleTable


def examples(*lengths: int) -> Examples:
    """Clients with so many examples: an example's number is its dense part, and its rows say it too."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    number = np.arange(offsets[-1], dtype=np.int64)
    return Examples(
        10 + np.arange(len(lengths), dtype=np.int64),
        offsets,
        number[:, None].astype(np.float32),
        np.stack([number, 100 + number // 2], axis=1),
        (number % 2).astype(np.float32),
    )


def table(*lengths: int) -> ExampleTable:
    held = examples(2)
    card = ExampleCard("numbers", len(lengths), sum(lengths), 2, 2)
    return ExampleTable(card, examples(*lengths), held, held, cardinalities=(100, 100))


def visit(lengths: tuple[int, ...], round: int = 1, seed: int = 1, **local: object) -> Work:
    """What all clients do in a round."""
    data = ExampleData(table(*lengths), Draws(seed))
    plan = Plan(round, {}, LocalSettings(**local))  # type: ignore[arg-type]
    return data.work(plan, np.arange(len(lengths), dtype=np.int64))


def seen(work: Work) -> list[list[int]]:
    """The numbers of the examples that each client trains on, in order."""
    return [
        work.inputs["dense"][place, ..., 0][work.inputs["weight"][place] > 0].astype(int).tolist()
        for place in range(len(work))
    ]


def test_an_epoch_takes_every_example_of_a_client_once() -> None:
    work = visit((5, 3, 8), epochs=1, batch_size=4)
    assert [sorted(each) for each in seen(work)] == [list(range(5)), [5, 6, 7], list(range(8, 16))]
    assert work.steps.tolist() == [2, 1, 2]
    assert work.examples.tolist() == [5, 3, 8]


def test_two_epochs_are_shuffled_apart() -> None:
    (each,) = seen(visit((30,), epochs=2, batch_size=10))
    assert sorted(each[:30]) == sorted(each[30:]) == list(range(30))
    assert each[:30] != each[30:]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(2, 12),
)
@settings(deadline=None, max_examples=60)
def test_visits_of_some_steps_meet_all_examples_equally_often(
    lengths: tuple[int, ...], batch_size: int, steps: int, rounds: int
) -> None:
    met: Counter[int] = Counter()
    for round in range(1, rounds + 1):
        for each in seen(visit(lengths, round, steps=steps, batch_size=batch_size)):
            met.update(each)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for start, stop in pairwise(offsets):
        counts = [met[number] for number in range(start, stop)]
        assert not counts or max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("share", "rounds"), [(1 / 3, 3), (0.25, 4), (0.00625, 160)])
def test_as_many_visits_of_a_share_as_it_takes_are_an_epoch(share: float, rounds: int) -> None:
    met: Counter[int] = Counter()
    for round in range(1, rounds + 1):
        for each in seen(visit((40, 7), round, epochs=1, share=share, batch_size=64)):
            met.update(each)
    assert met == Counter(dict.fromkeys(range(47), 1))


def test_rows_are_those_of_the_examples() -> None:
    work = visit((5, 3), epochs=1, batch_size=4)
    for place in range(2):
        ids = work.row_ids["category"].of(place)[work.slots["category"][place]]
        number = work.inputs["dense"][place, ..., 0].astype(np.int64)
        np.testing.assert_array_equal(ids, np.stack([number, 100 + number // 2], axis=-1))
        np.testing.assert_array_equal(work.inputs["label"][place], number % 2)


def test_a_client_fetches_no_rows_but_those_of_the_examples_it_takes() -> None:
    work = visit((64, 3), round=5, steps=1, batch_size=8)
    for place, numbers in enumerate(seen(work)):
        needed = {*numbers, *(100 + number // 2 for number in numbers)}
        assert set(work.row_ids["category"].of(place).tolist()) == needed


def test_padding_has_no_weight_and_a_client_without_examples_no_steps() -> None:
    work = visit((0, 3, 0), epochs=1, batch_size=4)
    assert work.steps.tolist() == [0, 1, 0]
    assert work.inputs["weight"].sum(axis=(1, 2)).tolist() == [0, 3, 0]
    assert work.inputs["dense"].shape == (3, 1, 4, 1)


def test_a_block_of_clients_without_examples_can_be_worked_on() -> None:
    work = visit((0, 0), epochs=1, batch_size=4)
    assert (len(work), work.steps.tolist(), work.inputs["weight"].sum()) == (2, [0, 0], 0.0)
    assert work.row_ids["category"].offsets.tolist()[0] == 0


def test_who_else_is_in_the_block_does_not_matter() -> None:
    data, plan = ExampleData(table(5, 3, 8), Draws(4)), Plan(3, {}, LocalSettings(steps=2, batch_size=2))
    together = data.work(plan, np.arange(3))
    for client in range(3):
        alone = data.work(plan, np.array([client]))
        assert seen(alone)[0] == seen(together)[client]


def test_another_round_and_another_seed_are_another_order() -> None:
    first = seen(visit((40,), epochs=1, batch_size=8))
    assert seen(visit((40,), epochs=1, batch_size=8)) == first
    assert seen(visit((40,), round=2, epochs=1, batch_size=8)) != first
    assert seen(visit((40,), seed=2, epochs=1, batch_size=8)) != first


def test_data_without_categories_has_no_rows() -> None:
    held = examples(4)
    plain = Examples(held.clients, held.offsets, held.dense, held.categories[:, :0], held.labels)
    data = ExampleData(ExampleTable(ExampleCard("x", 1, 4, 4, 4), plain, plain, plain), Draws(1))
    work = data.work(Plan(1, {}, LocalSettings(epochs=1)), np.array([0]))
    assert (work.slots, work.row_ids) == ({}, {})


def test_a_table_is_an_example_set() -> None:
    assert isinstance(table(2, 3), ExampleSet)
    assert table(2, 3).num_clients == 2
    taken = table(2, 3, 4).examples(np.array([2, 0]))
    assert_same_bits(taken.offsets, np.array([0, 4, 6]))
    assert taken.dense[:, 0].astype(int).tolist() == [5, 6, 7, 8, 0, 1]
    assert taken.clients.tolist() == [12, 10]


def test_parts_that_do_not_fit_together_are_refused() -> None:
    held = examples(3)
    with pytest.raises(DataError, match="as the offsets say"):
        Examples(held.clients, held.offsets, held.dense[:2], held.categories, held.labels)


@pytest.mark.parametrize(
    "settings", [{"epochs": 1, "share": 0.0}, {"epochs": 1, "share": 1.5}, {"steps": 1, "share": 0.5}]
)
def test_a_share_that_makes_no_sense_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=r"local.share"):
        LocalSettings(**settings)  # type: ignore[arg-type]
