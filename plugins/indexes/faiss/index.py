"""Indexes of faiss: a search that looks at a part of the items.

Douze et al., 2024, https://arxiv.org/abs/2401.08281. The largest inner product is found as the nearest neighbour, after
one more dimension has made all items equally long: Bachrach et al., 2014, https://doi.org/10.1145/2645710.2645741,
section 3.3. Searching by inner product itself clusters by direction alone, and items that many like, whose vectors and
biases are large, are then spread over all clusters: of 100,000 items with strong biases it found .004 of the ten best,
and the nearest neighbours .991 (benchmarks/retrieval.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import faiss
import numpy as np

from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError, RecipeError
from fedtower.recsys.retrieval import (
    Arrays,
    FloatArray,
    Found,
    IntArray,
    check_queries,
    check_vectors,
    padded,
    restored,
)

# faiss warns below 39 training points a list (Clustering.min_points_per_centroid): lists are no longer learnt well.
_POINTS_A_LIST = 39
# Measured: sq8 takes 66 us a query with 72 dimensions and 438 us with 65, which fill no vector register.
_LANES = 8
_ONLY_OF = {"nlist": ("ivf_flat", "sq8"), "nprobe": ("ivf_flat", "sq8"), "m": ("hnsw",), "ef_search": ("hnsw",)}
_ONLY_OF |= {"ef_construction": ("hnsw",)}


@dataclass(frozen=True)
class Faiss:
    """Lists of similar items of which the nearest few are searched (``ivf_flat``), the same with each number in a byte
    (``sq8``), or a graph from item to similar item (``hnsw``). The same seed gives the same bits.
    """

    kind: Literal["ivf_flat", "hnsw", "sq8"] = field(
        default="ivf_flat", metadata={"help": "lists, a graph, or lists of vectors in a quarter of the memory"}
    )
    metric: Literal["nearest", "inner_product"] = field(
        default="nearest",
        metadata={"help": "nearest: all items made equally long first; inner_product: for items without biases"},
    )
    nlist: int | None = field(default=None, metadata={"help": "lists; default: the square root of the number of items"})
    nprobe: int | None = field(default=None, metadata={"help": "lists looked at for a query; default: 16"})
    m: int | None = field(default=None, metadata={"help": "neighbours of an item in the graph; default: 16"})
    ef_construction: int | None = field(default=None, metadata={"help": "width of the search that builds; default: 80"})
    ef_search: int | None = field(default=None, metadata={"help": "width of the search for a query; default: 64"})

    def __post_init__(self) -> None:
        for name, kinds in _ONLY_OF.items():
            value = getattr(self, name)
            if value is not None and self.kind not in kinds:
                raise RecipeError(
                    f"index.{name} is a setting of kind = {' and '.join(map(repr, kinds))}, not of {self.kind!r}; "
                    f"leave it out, or choose another index.kind"
                )
            if value is not None and value < 1:
                raise RecipeError(f"index.{name} must be at least 1, but is {value}")

    def build(self, vectors: FloatArray, ids: IntArray, draws: Draws) -> FaissIndex:
        """The index of the vectors, built on one thread, so that its bits do not depend on how many there are."""
        check_vectors(vectors, ids)
        longest = float(np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1).max()))
        held = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.metric == "nearest":
            held = _equally_long(held, longest)
        if self.kind == "sq8":
            held = _as_wide(held, -(-held.shape[1] // _LANES) * _LANES)
        seed = int(draws.bits("index")) & 0x7FFFFFFF
        index = self._empty(held.shape[1], len(held), seed)
        with one_thread():
            index.train(held)
            index.add(held)
        return self._ready(index, np.array(ids, dtype=np.int64), vectors.shape[1], longest)

    def restore(self, arrays: Arrays) -> FaissIndex:
        """The index of a snapshot."""
        blob, ids, dim, longest = restored(arrays, ("faiss", "ids", "dim", "longest"), "faiss")
        try:
            index = faiss.deserialize_index(blob)
        except RuntimeError as error:
            raise CheckpointError(f"the saved index cannot be read by faiss {faiss.__version__}: {error}") from error
        if not isinstance(index, self._class()) or index.metric_type != self._metric() or index.ntotal != len(ids):
            raise CheckpointError(
                f"the saved index is a {type(index).__name__} of {index.ntotal} items, but [index] asks for kind = "
                f"{self.kind!r}, metric = {self.metric!r}, and {len(ids)} ids are saved; was it built with another "
                f"[index]?"
            )
        return self._ready(index, ids, int(dim), float(longest))

    def _empty(self, dim: int, count: int, seed: int) -> Any:
        """The index before it has seen a vector."""
        metric = self._metric()
        if self.kind == "hnsw":
            graph: Any = faiss.IndexHNSWFlat(dim, self.m or 16, metric)
            graph.hnsw.efConstruction = self.ef_construction or 80
            graph.hnsw.rng = faiss.RandomGenerator(seed)  # type: ignore[attr-defined]  # its types leave that out
            return graph
        nlist = self.nlist or max(1, min(round(count**0.5), count // _POINTS_A_LIST))
        if nlist > count:
            raise RecipeError(f"index.nlist = {nlist} lists cannot be made of {count} items; make it smaller")
        coarse = faiss.IndexFlat(dim, metric)
        lists: Any
        if self.kind == "sq8":
            lists = faiss.IndexIVFScalarQuantizer(coarse, dim, nlist, faiss.ScalarQuantizer.QT_8bit, metric)
        else:
            lists = faiss.IndexIVFFlat(coarse, dim, nlist, metric)
        lists.cp.seed = seed
        lists.cp.min_points_per_centroid = 1  # whoever asked for so many lists by name gets them, without a warning
        return lists

    def _ready(self, index: Any, ids: IntArray, dim: int, longest: float) -> FaissIndex:
        """The index with the settings of a search, which faiss keeps in it."""
        if self.kind == "hnsw":
            index.hnsw.efSearch = self.ef_search or 64
        else:
            index.nprobe = self.nprobe or 16
        return FaissIndex(index, ids, dim, longest)

    def _class(self) -> type:
        classes = {"hnsw": "IndexHNSWFlat", "sq8": "IndexIVFScalarQuantizer", "ivf_flat": "IndexIVFFlat"}
        chosen: type = getattr(faiss, classes[self.kind])
        return chosen

    def _metric(self) -> int:
        return int(faiss.METRIC_L2 if self.metric == "nearest" else faiss.METRIC_INNER_PRODUCT)


@dataclass(frozen=True, eq=False)
class FaissIndex:
    """faiss's index of the items called ``ids`` (I,) with ``dim`` dimensions, the longest of length ``longest``."""

    index: Any
    ids: IntArray
    dim: int
    longest: float

    def search(self, queries: FloatArray, k: int) -> Found:
        """The best of the items that are looked at.

        Scores of ``sq8`` are of the rounded vectors. Those of the nearest neighbours are computed from distances, so
        they are exact up to the rounding of the squares of both lengths.
        """
        nearest = self.index.metric_type == faiss.METRIC_L2
        check_queries(queries, self.dim, k)
        asked = _as_wide(queries, self.index.d)
        count = min(k, len(self.ids))
        with one_thread():
            scores, places = self.index.search(asked, count)
        found = np.where(places < 0, -1, self.ids[places])
        if nearest:
            # |q - v|^2 = |q|^2 + longest^2 - 2 q.v, since all vectors are equally long.
            scores = ((asked**2).sum(axis=1, keepdims=True) + np.float32(self.longest**2) - scores) / 2
        scores = np.where(places < 0, np.float32(-np.inf), scores).astype(np.float32)
        return padded(found, scores, k)

    def snapshot(self) -> Arrays:
        """faiss's own format, in bytes, and ours beside it."""
        return {
            "faiss": faiss.serialize_index(self.index),
            "ids": self.ids,
            "dim": np.asarray(self.dim),
            "longest": np.asarray(self.longest),
        }


def _as_wide(vectors: FloatArray, width: int) -> FloatArray:
    """The vectors with zeros after them, which change no inner product and no distance."""
    return np.pad(np.asarray(vectors, dtype=np.float32), ((0, 0), (0, width - vectors.shape[1])))


def _equally_long(vectors: FloatArray, longest: float) -> FloatArray:
    """One more dimension, ``sqrt(longest^2 - |v|^2)``: then the nearest vector is the one with the largest product."""
    squares = (vectors.astype(np.float64) ** 2).sum(axis=1)
    rest = np.sqrt(np.maximum(longest**2 - squares, 0.0))
    return np.concatenate([vectors, rest[:, None].astype(np.float32)], axis=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """faiss on one thread inside, and as it was after: torch and faiss share one pool of threads in this process, and
    torch's sums depend on how many there are.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
