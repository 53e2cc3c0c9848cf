"""The index ``exact``: its promises, and its best against sorting everything."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtower.core.draws import Draws
from fedtower.plugins.indexes.exact import Exact
from fedtower.recsys.testing.index import IndexPromises, items, names, queries


class TestExact(IndexPromises):
    make = Exact


def test_three_items_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 2], [-1, -1]], dtype=np.float32)
    index = Exact().build(vectors, np.array([10, 20, 30]), Draws(1))
    ids, scores = index.search(np.array([[3, 1]], dtype=np.float32), 4)
    assert ids.tolist() == [[10, 20, 30, -1]]
    assert scores.tolist() == [[3.0, 2.0, -4.0, -np.inf]]


@given(count=st.integers(1, 3_000), k=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_it_finds_what_sorting_everything_finds(count: int, k: int, seed: int) -> None:
    draws = Draws(seed)
    axes = np.arange(3, dtype=np.int64)
    # Whole numbers: products are exact, and many are equal.
    vectors = draws.integers(7, "item", np.arange(count)[:, None], axes).astype(np.float32) - 3
    asked = draws.integers(7, "user", np.arange(4)[:, None], axes).astype(np.float32) - 3
    ids, scores = Exact().build(vectors, names(count), draws).search(asked, k)
    everything = asked @ vectors.T
    best = -np.sort(-everything, axis=1)[:, :k]
    np.testing.assert_array_equal(scores[:, : min(k, count)], best)
    np.testing.assert_array_equal(
        np.take_along_axis(everything, (ids[:, : min(k, count)] - 5) // 3, axis=1), best, err_msg="whose scores"
    )


def test_many_queries_are_answered_in_tiles(monkeypatch: object) -> None:
    from fedtower.recsys import retrieval

    whole = retrieval.exact_search(items(), queries(), 7)
    monkeypatch.setattr(retrieval, "_SCORES", 3 * len(items()))  # type: ignore[attr-defined]
    tiled = retrieval.exact_search(items(), queries(), 7)
    np.testing.assert_array_equal(tiled[0], whole[0])
    np.testing.assert_allclose(tiled[1], whole[1], rtol=1e-5, atol=1e-5)
