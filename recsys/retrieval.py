"""Index: the items whose vectors have the largest inner product with a user's, found without scoring them all.

What is searched for is always the inner product. A bias of an item is one more dimension, in which every query is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.errors import CheckpointError, DataError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
Found = tuple[IntArray, FloatArray]

# Scores that are held at a time: 64 MB of them, however many queries there are.
_SCORES = 1 << 24
# Blocks of the catalogue whose best score is looked at first; measured, 64 to 256 take the same time.
_BLOCK = 128


class RetrievalError(DataError):
    """Vectors or queries that an index cannot take."""


class Index(Protocol):
    """A built index: it searches, and can be saved."""

    def search(self, queries: FloatArray, k: int) -> Found:
        """The ids of the best items for each query and their scores, best first.

        What is not found (there are fewer than ``k`` items, or the index looks at fewer) is the id -1 with the score
        minus infinity, at the end of a row.

        Shape:
            queries ``(B, D)`` -> ids ``(B, k)``, scores ``(B, k)``

        Raises:
            RetrievalError: queries of another width, or with values that are not finite.
        """
        ...

    def snapshot(self) -> Arrays:
        """Everything that :meth:`IndexBuilder.restore` needs to search alike."""
        ...


class IndexBuilder(Protocol):
    """The seam of an index plugin: a frozen dataclass of settings that builds an index, or brings back a saved one."""

    def build(self, vectors: FloatArray, ids: IntArray, draws: Draws) -> Index:
        """The index of ``vectors`` (I, D), whose items are called ``ids`` (I,); the same seed gives the same bits.

        Raises:
            RetrievalError: see :func:`check_vectors`.
            RecipeError: the settings are not for so many items.
        """
        ...

    def restore(self, arrays: Arrays) -> Index:
        """The index of a snapshot.

        Raises:
            CheckpointError: the snapshot is not one of this builder's.
        """
        ...


def check_vectors(vectors: FloatArray, ids: IntArray) -> None:
    """Refuse what cannot be an index's items.

    Raises:
        RetrievalError: no vectors, ids that are not one for each or not distinct, or values that are not finite.
    """
    if vectors.ndim != 2 or not vectors.size or ids.shape != vectors.shape[:1]:
        raise RetrievalError(
            f"an index is built from vectors (I, D) and ids (I,), but got {vectors.shape} and {ids.shape}"
        )
    if ids.min() < 0 or len(np.unique(ids)) != len(ids):
        raise RetrievalError("the ids of an index's items must be distinct numbers from 0 on")
    if not np.isfinite(vectors).all():
        bad = int(ids[~np.isfinite(vectors).all(axis=1)][0])
        raise RetrievalError(f"the vector of item {bad} is not finite; has the training diverged? Try a smaller lr")


def check_queries(queries: FloatArray, dim: int, k: int) -> None:
    """Refuse what an index of ``dim`` dimensions cannot be asked.

    Raises:
        RetrievalError: queries of another shape, values that are not finite, or ``k`` below 1.
    """
    if queries.ndim != 2 or queries.shape[1] != dim or k < 1:
        raise RetrievalError(
            f"this index takes queries (B, {dim}) and k from 1 on, but was asked with {queries.shape} and k = {k}; was "
            f"it built from another model?"
        )
    if not np.isfinite(queries).all():
        raise RetrievalError("a query is not finite; has the training diverged? Try a smaller lr")


def exact_search(vectors: FloatArray, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """The places of the ``k`` vectors with the largest inner products, and those, best first.

    Shape:
        vectors ``(I, D)``, queries ``(B, D)`` -> ``(B, min(k, I))`` twice
    """
    k, step = min(k, len(vectors)), max(1, _SCORES // len(vectors))
    tiles = [_best(queries[at : at + step] @ vectors.T, k) for at in range(0, len(queries), step)]
    if not tiles:
        return np.zeros((0, k), dtype=np.int64), np.zeros((0, k), dtype=np.float32)
    return np.concatenate([places for places, _ in tiles]), np.concatenate([scores for _, scores in tiles])


def _best(scores: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """The places of the ``k`` largest of each row, and those; which of equals is the last of them is not said.

    The ``k`` largest lie in the ``k`` blocks whose largest are largest, so only the scores of those are sorted.
    """
    rows, width = scores.shape
    blocks = -(-width // _BLOCK)
    if blocks <= 2 * k:
        return _sorted(scores, np.broadcast_to(np.arange(width), scores.shape), k)
    padded = np.full((rows, blocks * _BLOCK), -np.inf, dtype=np.float32)
    padded[:, :width] = scores
    # Block b is the places b, b + blocks, b + 2 blocks, ...: its maximum is one pass over whole rows.
    largest = padded.reshape(rows, _BLOCK, blocks).max(axis=1)
    chosen = np.argpartition(-largest, k, axis=1)[:, :k]
    places = (chosen[:, None, :] + blocks * np.arange(_BLOCK)[None, :, None]).reshape(rows, -1)
    return _sorted(np.take_along_axis(padded, places, axis=1), places, k)


def _sorted(scores: FloatArray, places: IntArray, k: int) -> tuple[IntArray, FloatArray]:
    if k < scores.shape[1]:
        best = np.argpartition(-scores, k, axis=1)[:, :k]
        scores, places = np.take_along_axis(scores, best, axis=1), np.take_along_axis(places, best, axis=1)
    order = np.lexsort((places, -scores), axis=1)
    return np.take_along_axis(places, order, axis=1).astype(np.int64), np.take_along_axis(scores, order, axis=1)


def padded(ids: IntArray, scores: FloatArray, k: int) -> Found:
    """What was found, with columns of -1 and minus infinity until there are ``k``."""
    missing = ((0, 0), (0, k - ids.shape[1]))
    return np.pad(ids, missing, constant_values=-1), np.pad(scores, missing, constant_values=-np.inf)


def recall(found: IntArray, truth: IntArray) -> float:
    """The share of the ids in ``truth`` (B, K) that are in the same row of ``found`` (B, K).

    >>> recall(np.array([[4, 2], [1, -1]]), np.array([[2, 4], [1, 3]]))
    0.75
    """
    return float((truth[:, :, None] == found[:, None, :]).any(axis=2).mean())


def candidates(index: Index, query: FloatArray, unwanted: IntArray, count: int, num_items: int) -> IntArray | None:
    """The ids of at least ``count`` of the best items for ``query`` (D,), none of them ``unwanted``.

    It asks for more until there are enough, or until all items were asked for. ``None`` when the index, which may look
    at a part of the items only, knows no more: then there is no way around scoring them all.
    """
    asked = min(count + len(unwanted), num_items)
    while True:
        ids = index.search(query[None], asked)[0][0]
        found: IntArray = ids[(ids >= 0) & ~np.isin(ids, unwanted)]
        if len(found) >= min(count, num_items - len(unwanted)):
            return found
        if asked == num_items or ids[-1] < 0:
            return None
        asked = min(2 * asked, num_items)


def restored(arrays: Arrays, names: tuple[str, ...], builder: str) -> list[NDArray[Any]]:
    """The arrays of a snapshot by name.

    Raises:
        CheckpointError: it holds others.
    """
    if sorted(arrays) != sorted(names):
        raise CheckpointError(
            f"a saved index of {builder!r} holds {', '.join(sorted(names))}, but this one {', '.join(sorted(arrays))}; "
            f"was it built with another [index]?"
        )
    return [arrays[name] for name in names]
