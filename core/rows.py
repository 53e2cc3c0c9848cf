"""RowStore: rows by id for tables that stay in the cloud, and the arithmetic of rows that every runtime shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class RowIds:
    """The rows that each of C clients needs, jagged, sorted and distinct within a client.

    Shape:
        ``offsets`` (C+1,), ``ids`` (R,).
    """

    offsets: IntArray
    ids: IntArray

    def of(self, position: int) -> IntArray:
        """The row ids of the client at ``position``."""
        return self.ids[self.offsets[position] : self.offsets[position + 1]]


class RowReader(Protocol):
    """Rows by id, as clients are given them."""

    def fetch(self, source: str, ids: IntArray) -> FloatArray:
        """The rows of ``ids``, (n, D). Raises RowOutOfRange for an id that the source does not have."""
        ...


class RowStore(RowReader, Protocol):
    """Cloud tables and cloud towers, seen as rows by id."""

    @property
    def generation(self) -> int:
        """How many times the store has been stepped."""
        ...

    def apply(self, deltas: Mapping[str, tuple[IntArray, FloatArray]], lr_scale: float) -> None:
        """Step the tables (and towers) towards ``deltas[source] = (ids (n,), row deltas (n, D))``, ids distinct."""
        ...

    def snapshot(self) -> Mapping[str, NDArray[Any]]:
        """Everything that a later :meth:`restore` needs to continue bit for bit."""
        ...

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a snapshot."""
        ...


def localise(ids: IntArray) -> tuple[RowIds, IntArray]:
    """The distinct ids of each client and, in the shape of ``ids``, where each stands among them.

    Shape:
        ``ids`` (C, n) -> :class:`RowIds`, (C, n) positions within the client's own rows.
    """
    order, ordered = _sorted(ids)
    first = np.ones_like(ids, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    local = np.empty_like(ids)
    np.put_along_axis(local, order, np.cumsum(first, axis=1) - 1, axis=1)
    offsets = np.concatenate([[0], np.cumsum(first.sum(axis=1))]).astype(np.int64)
    return RowIds(offsets, ordered[first]), local


def _sorted(ids: IntArray) -> tuple[IntArray, IntArray]:
    """Each client's ids in ascending order, equal ones in the order in which they stand: their places, and they."""
    bits = ids.shape[1].bit_length()
    if ids.size and ids.min() >= 0 and ids.max() < 1 << (63 - bits):
        # Id and place in one word: one sort of plain integers, which is vectorised, takes a fifth of a stable argsort.
        words = (ids << bits) | np.arange(ids.shape[1], dtype=np.int64)
        words.sort(axis=1)
        return words & ((1 << bits) - 1), words >> bits
    order = np.argsort(ids, axis=1, kind="stable")
    return order, np.take_along_axis(ids, order, axis=1)


def distinct(ids: IntArray) -> tuple[IntArray, IntArray]:
    """The distinct ids, sorted, and where each of ``ids`` stands among them: ``np.unique`` with its inverse.

    Shape:
        ``ids`` (n,) -> (m,), (n,)
    """
    if not len(ids) or ids.min() < 0 or ids.max() >= 16 * len(ids):
        found, place = np.unique(ids, return_inverse=True)
        return found, place.astype(np.int64)
    # Where ids are dense, marking them costs an eighth of sorting them.
    marked = np.zeros(int(ids.max()) + 1, dtype=bool)
    marked[ids] = True
    return np.flatnonzero(marked).astype(np.int64), (np.cumsum(marked) - 1)[ids]


def sum_duplicates(ids: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    """The distinct ids, sorted, and the sum of the values of each.

    The order in which an id's values are summed depends on its own values alone, so that which other ids are there
    changes no bit.

    Shape:
        ``ids`` (n,), ``values`` (n, D) -> (m,), (m, D)
    """
    if not len(ids):
        return ids, values
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[starts], np.add.reduceat(values[order], starts, axis=0)


def step_rows(rows: FloatArray, local_ids: IntArray, gradients: FloatArray, lr: float) -> FloatArray:
    """The device's copy of its rows after one step of gradient descent; duplicates among the slots are summed first.

    Shape:
        ``rows`` (R, D), ``local_ids`` (n,) into them, ``gradients`` (n, D) -> (R, D), a new array
    """
    touched, summed = sum_duplicates(local_ids, gradients)
    stepped = rows.copy()
    stepped[touched] -= np.float32(lr) * summed
    return stepped
