"""What every index promises."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError
from fedtower.core.testing.promises import Promises, Untouched, assert_same_bits
from fedtower.recsys.retrieval import Index, RetrievalError, exact_search, recall

FloatArray = NDArray[np.float32]
ITEMS, DIM, QUERIES = 2_000, 12, 50
LEAST_RECALL = 0.9


class IndexPromises(Promises):
    """``make`` gives an index builder; it is tried on 2,000 items, of which some are far more popular than others."""

    @pytest.fixture
    def vectors(self) -> FloatArray:
        """Items (I, D) in 40 groups; the last dimension is a bias, as of a model."""
        return items()

    @pytest.fixture
    def index(self, vectors: FloatArray) -> Index:
        """The index of the items, called 3 i + 5."""
        return self.built(vectors)

    def built(self, vectors: FloatArray, seed: int = 1) -> Index:
        """An index of these vectors."""
        index: Index = self.made().build(vectors, names(len(vectors)), Draws(seed))
        return index

    def test_it_finds_nearly_all_of_the_best_ten(self, index: Index, vectors: FloatArray) -> None:
        found, _ = index.search(queries(), 10)
        assert recall(found, names()[exact_search(vectors, queries(), 10)[0]]) >= LEAST_RECALL

    def test_scores_are_inner_products_best_first(self, index: Index, vectors: FloatArray) -> None:
        ids, scores = index.search(queries(), 20)
        assert ids.shape == scores.shape == (QUERIES, 20)
        assert (ids.dtype.name, scores.dtype.name) == ("int64", "float32")
        known = ids >= 0
        products = np.einsum("bkd,bd->bk", vectors[np.maximum(ids - 5, 0) // 3], queries())
        np.testing.assert_allclose(scores[known], products[known], rtol=0.02, atol=0.3)
        assert np.all(scores[:, 1:] <= scores[:, :-1])

    def test_ids_are_those_of_the_items_and_each_comes_once(self, index: Index) -> None:
        for row in index.search(queries(), 20)[0]:
            kept = row[row >= 0]
            assert np.isin(kept, names()).all()
            assert len(np.unique(kept)) == len(kept)

    def test_what_is_not_there_is_minus_one_at_the_end(self) -> None:
        few = self.built(items()[:3])
        ids, scores = few.search(queries()[:4], 5)
        assert ids.shape == (4, 5)
        assert np.all(ids[:, 3:] == -1)
        assert np.all(np.isneginf(scores[ids == -1]))
        assert np.isfinite(scores[ids >= 0]).all()
        assert np.all(ids[:, 0] >= 0)

    def test_a_single_item_is_found(self) -> None:
        assert self.built(items()[:1]).search(queries()[:1], 1)[0].tolist() == [[5]]

    def test_no_queries_find_nothing(self, index: Index) -> None:
        ids, scores = index.search(queries()[:0], 10)
        assert ids.shape == scores.shape == (0, 10)

    def test_a_query_is_answered_by_itself(self, index: Index) -> None:
        together = index.search(queries(), 10)[0]
        alone = np.concatenate([index.search(query[None], 10)[0] for query in queries()])
        assert recall(alone, together) > 0.99, "only rounding may depend on what else is asked"

    def test_the_same_seed_gives_the_same_bits(self, index: Index, vectors: FloatArray) -> None:
        assert_same_bits(dict(self.built(vectors).snapshot()), dict(index.snapshot()))

    def test_a_saved_index_searches_alike(self, index: Index) -> None:
        saved = {name: np.array(array) for name, array in index.snapshot().items()}
        again: Index = self.made().restore(saved)
        assert_same_bits(again.search(queries(), 10), index.search(queries(), 10))
        assert_same_bits(dict(again.snapshot()), saved)

    def test_a_snapshot_of_something_else_is_refused(self) -> None:
        with pytest.raises(CheckpointError):
            self.made().restore({"something": np.zeros(3)})

    def test_what_it_is_given_stays_as_it_is(self, vectors: FloatArray) -> None:
        few, ids, asked = vectors[:200].copy(), names(200), queries()
        with Untouched(few, ids, asked):
            self.made().build(few, ids, Draws(1)).search(asked, 10)

    def test_a_change_of_the_vectors_afterwards_does_not_show(self) -> None:
        few = items()[:200]
        index = self.built(few)
        before = index.search(queries(), 5)
        few[:] = 0.0
        assert_same_bits(index.search(queries(), 5), before)

    @pytest.mark.parametrize("broken", ["no items", "too few ids", "the same id twice", "a value that is not a number"])
    def test_items_that_cannot_be_searched_are_refused(self, broken: str) -> None:
        vectors, ids = items()[:60], names(60)
        if broken == "no items":
            vectors, ids = vectors[:0], ids[:0]
        elif broken == "too few ids":
            ids = ids[:-1]
        elif broken == "the same id twice":
            ids[1] = ids[0]
        else:
            vectors[7, 2] = np.nan
        with pytest.raises(RetrievalError):
            self.made().build(vectors, ids, Draws(1))

    @pytest.mark.parametrize("broken", ["another width", "a value that is not a number", "no k"])
    def test_queries_that_do_not_fit_are_refused(self, index: Index, broken: str) -> None:
        asked, k = queries(), 10
        if broken == "another width":
            asked = asked[:, 1:]
        elif broken == "no k":
            k = 0
        else:
            asked[3, 1] = np.inf
        with pytest.raises(RetrievalError):
            index.search(asked, k)


def names(count: int = ITEMS) -> NDArray[np.int64]:
    """What the items are called: not their places."""
    return 3 * np.arange(count, dtype=np.int64) + 5


def items(count: int = ITEMS, dim: int = DIM) -> FloatArray:
    """Items (I, D) in 40 groups; the last dimension is a bias: how popular, by Zipf's law."""
    draws = Draws(5)
    places = np.arange(count, dtype=np.int64)
    axes = np.arange(dim - 1, dtype=np.int64)
    group = draws.integers(40, "group", places)
    vectors = draws.normal("centre", group[:, None], axes[None, :]) + 0.4 * draws.normal(
        "item", places[:, None], axes[None, :]
    )
    bias = 2 * np.log(count / (1.0 + draws.permutation(count, "popularity")))
    return np.concatenate([vectors, bias[:, None]], axis=1).astype(np.float32)


def queries(count: int = QUERIES, dim: int = DIM) -> FloatArray:
    """Queries (B, D) near the groups; the last dimension is 1, the bias's."""
    draws = Draws(6)
    places, axes = np.arange(count, dtype=np.int64), np.arange(dim - 1, dtype=np.int64)
    group = draws.integers(40, "group of a user", places)
    near = Draws(5).normal("centre", group[:, None], axes[None, :]) + 0.4 * draws.normal(
        "user", places[:, None], axes[None, :]
    )
    return np.concatenate([near, np.ones((count, 1))], axis=1).astype(np.float32)
