"""Candidates for one user, recall, and what an index refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError
from fedtower.plugins.indexes.exact import Exact, ExactIndex
from fedtower.recsys.retrieval import Arrays, FloatArray, Found, candidates, exact_search, padded, recall, restored


def line(count: int) -> ExactIndex:
    """Items 0, 1, 2, ... of which each is better than the next, for the query 1."""
    return Exact().build(-np.arange(count, dtype=np.float32)[:, None], np.arange(count, dtype=np.int64), Draws(1))


@dataclass
class Shallow:
    """An index that looks at the first few items of another only, and remembers how many it was asked for."""

    index: ExactIndex
    depth: int
    asked: list[int] = field(default_factory=list)

    def search(self, queries: FloatArray, k: int) -> Found:
        self.asked.append(k)
        ids, scores = self.index.search(queries, min(k, self.depth))
        return padded(ids, scores, k)

    def snapshot(self) -> Arrays:
        return self.index.snapshot()


ONE = np.ones(1, dtype=np.float32)


@given(count=st.integers(1, 60), k=st.integers(1, 70), data=st.data())
@settings(max_examples=80, deadline=None)
def test_candidates_hold_the_best_that_are_wanted(count: int, k: int, data: st.DataObject) -> None:
    unwanted = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1)))), dtype=np.int64)
    found = candidates(line(count), ONE, unwanted, k, count)
    assert found is not None
    wanted = np.setdiff1d(np.arange(count), unwanted)
    np.testing.assert_array_equal(found[:k], wanted[:k])
    assert not np.isin(found, unwanted).any()


def test_an_index_that_repeats_the_seen_is_asked_for_more() -> None:
    # Twenty were seen, but the index holds them twice over: asking for 5 + 20 gives too few.
    ids = np.concatenate([np.arange(20), np.arange(20), np.arange(20, 60)])
    index = Shallow(ExactIndex(line(80).vectors, ids.astype(np.int64)), depth=80)
    found = candidates(index, ONE, np.arange(20), 8, 60)
    assert found is not None
    np.testing.assert_array_equal(found[:8], np.arange(20, 28))
    assert index.asked == [28, 56]


def test_an_index_that_knows_no_more_says_so() -> None:
    seen = np.arange(10)
    assert candidates(Shallow(line(50), depth=12), ONE, seen, 5, 50) is None
    found = candidates(Shallow(line(50), depth=15), ONE, seen, 5, 50)
    assert found is not None
    assert found.tolist() == [10, 11, 12, 13, 14]


def test_recall_by_hand() -> None:
    truth = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall(truth, truth) == 1.0
    assert recall(truth[:, ::-1], truth) == 1.0
    assert recall(np.array([[1, 2, 9, -1], [1, 2, 3, 4]]), truth) == 0.25


def test_no_queries_find_nothing() -> None:
    places, scores = exact_search(np.ones((3, 2), dtype=np.float32), np.ones((0, 2), dtype=np.float32), 2)
    assert places.shape == scores.shape == (0, 2)


def test_a_snapshot_of_another_part_names_both() -> None:
    with pytest.raises(CheckpointError, match="saved index of 'mine' holds a, b, but this one c"):
        restored({"c": np.zeros(1)}, ("b", "a"), "mine")
