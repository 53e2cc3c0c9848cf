"""Every item scored for every query: nothing is missed, and time grows with the catalogue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtower.core.draws import Draws
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.recsys.retrieval import (
    Arrays,
    FloatArray,
    Found,
    IntArray,
    check_queries,
    check_vectors,
    exact_search,
    padded,
    restored,
)


@dataclass(frozen=True)
class Exact:
    """Keeps the vectors as they are. Up to some ten thousand items it is as quick as any other index."""

    def build(self, vectors: FloatArray, ids: IntArray, draws: Draws) -> ExactIndex:
        """The index of the vectors; nothing is drawn."""
        check_vectors(vectors, ids)
        return ExactIndex(np.array(vectors, dtype=np.float32, order="C"), np.array(ids, dtype=np.int64))

    def restore(self, arrays: Arrays) -> ExactIndex:
        """The index of a snapshot."""
        vectors, ids = restored(arrays, ("vectors", "ids"), "exact")
        return ExactIndex(vectors, ids)


@dataclass(frozen=True, eq=False)
class ExactIndex:
    """Vectors ``(I, D)`` and the ids ``(I,)`` of their items."""

    vectors: FloatArray
    ids: IntArray

    def search(self, queries: FloatArray, k: int) -> Found:
        """The best of all items."""
        check_queries(queries, self.vectors.shape[1], k)
        places, scores = exact_search(self.vectors, queries, k)
        return padded(self.ids[places], scores, k)

    def snapshot(self) -> Arrays:
        """Both."""
        return {"vectors": self.vectors, "ids": self.ids}


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.index("exact", "fedtower.plugins.indexes.exact:Exact", summary="every item scored; nothing is missed")
