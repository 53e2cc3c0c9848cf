from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.testing import examples
from fedtower.plugins.attacks.promote import Promote
from fedtower.recsys.attacks import Market
from fedtower.recsys.population import Events
from fedtower.recsys.testing.attack import histories, market


def test_one_event_in_so_many_is_with_the_item_and_the_last_two_are_not() -> None:
    events = histories()
    made = Promote(every=4).forged(events, market())
    for start, stop in zip(events.offsets[:-1], events.offsets[1:], strict=True):
        told = np.flatnonzero(made[start:stop] == market().promoted)
        assert told.tolist() == list(range(2, stop - start - 2, 4))


def test_the_others_are_the_most_popular_ones_and_none_comes_twice() -> None:
    events = histories()
    made = Promote(every=4, fillers=45).forged(events, market())
    for start, stop in zip(events.offsets[:-1], events.offsets[1:], strict=True):
        others = made[start:stop][made[start:stop] != market().promoted]
        assert len(np.unique(others)) == len(others)
        assert others.max() <= 45  # of 0 to 45, without the promoted item 40
    assert not np.array_equal(made[:6], made[events.offsets[1] : events.offsets[1] + 6]), "each has an order of her own"


@settings(deadline=None)
@given(st.integers(2, 12).flatmap(lambda items: st.tuples(st.just(items), st.lists(st.integers(0, items), min_size=1))))
@example((6, [6]))
def test_the_last_two_are_none_of_the_others_however_small_the_catalogue(drawn: tuple[int, list[int]]) -> None:
    items, lengths = drawn
    told = Market(np.arange(items), items - 1, Draws(3))
    events = Events(
        np.arange(len(lengths)),
        np.cumsum([0, *lengths]),
        np.concatenate([np.arange(length) for length in lengths]),
        np.zeros(sum(lengths), dtype=np.int64),
        np.ones(sum(lengths), dtype=np.float32),
    )
    for every in (1, 2, 5, 20):
        made = Promote(every=every, fillers=3).forged(events, told)
        assert np.isin(made, np.arange(items)).all()
        for start, stop in zip(events.offsets[:-1], events.offsets[1:], strict=True):
            kept = max(start, stop - 2)
            assert not np.isin(made[kept:stop], made[start:kept]).any()
            assert len(np.unique(made[kept:stop])) == stop - kept


def test_the_update_is_sent_so_many_times_as_long() -> None:
    updates, bad = examples.updates(3), np.array([True, False, False])
    np.testing.assert_allclose(Promote(scale=7).sent(updates, bad).norms / updates.norms, [7, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["scale", "every", "fillers"])
def test_settings_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"attack\.{name} must be above 0, not 0"):
        Promote(**{name: 0})
