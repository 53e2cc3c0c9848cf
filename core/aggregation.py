"""Aggregator: many updates to one, by folding blocks; and the sum whose bits do not depend on the order of arrival."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import UpdateError
from fedtower.core.updates import Rows, Updates

IntArray = NDArray[np.int64]
State = Mapping[str, NDArray[Any]]

# A weighted delta is rounded to a multiple of this before it is summed, so that what is summed are integers: at 2**-32
# a delta of 1e-6 keeps 12 bits, and a round's total may reach 2**31.
GRID = 2.0**-32


class Aggregator(Protocol):
    """Folds a cohort's blocks into one total: ``weights`` (1,), ``dense[name]`` (1, *shape) and, by table, the mean
    delta of each touched row over the clients that touched it, with the weight of those clients in ``row_weights``.
    """

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        """The total of ``blocks`` and the aggregator's next state. Raises UpdateError when there is nothing to fold."""
        ...


class GridSum:
    """The weighted sum of updates, exact on a grid: the same bits for any order and any width of blocks.

    Each weighted delta is rounded once to a multiple of ``grid``, and the integers are summed.

    Raises:
        UpdateError: a value that is not finite, or a sum that could leave the 64-bit range.
    """

    def __init__(self, grid: float = GRID) -> None:
        self._grid = grid
        self._weight = 0
        self._reach = 0.0  # no sum can be larger than this
        self._dense: dict[str, IntArray] = {}
        self._rows: dict[str, tuple[IntArray, IntArray, IntArray]] = {}

    def add(self, block: Updates, weights: NDArray[np.float64]) -> None:
        """Take in a block, each client times its weight (C,)."""
        if not len(block):
            return
        if not np.all(np.isfinite(weights)) or weights.min() < 0:
            raise UpdateError(
                f"the weights of a block must be finite and not negative, but they are {weights[:8].tolist()}"
            )
        scale = weights / self._grid
        counted = np.rint(scale).astype(np.int64)
        self._weight += int(counted.sum())
        reach = 0.0
        for name, delta in block.dense.items():
            rounded = self._round(delta, scale, block, name)
            reach = max(reach, float(np.abs(rounded).max(initial=0)) * len(block))
            total = rounded.astype(np.int64).sum(axis=0)
            self._dense[name] = self._dense[name] + total if name in self._dense else total
        for table, rows in block.rows.items():
            owners = rows.owners
            rounded = self._round(rows.row_deltas, scale[owners], block, table)
            reach = max(reach, float(np.abs(rounded).max(initial=0)) * len(block))
            self._add_rows(table, rows.row_ids, rounded.astype(np.int64), counted[owners])
        self._reach += max(reach, float(counted.sum()))
        if self._reach >= 2.0**62:
            raise UpdateError(
                f"the weighted updates of this cohort are too large to sum exactly: they reach "
                f"{self._reach * self._grid:.3g}, and the limit is {2.0**62 * self._grid:.3g}; "
                f"clip them (transform 'clip'), or lower local.lr"
            )

    def total(self) -> Updates:
        """The weighted mean: dense over all clients, each row over the clients that touched it."""
        if self._weight == 0:
            raise UpdateError("there is nothing to average: no client sent an update with a positive weight")
        dense = {name: (total / self._weight).astype(np.float32)[None] for name, total in self._dense.items()}
        rows = {}
        for table, (ids, sums, weights) in self._rows.items():
            mean = (sums / np.maximum(weights, 1)[:, None]).astype(np.float32)
            rows[table] = Rows(
                np.array([0, len(ids)], dtype=np.int64), ids, mean, (weights * self._grid).astype(np.float64)
            )
        return Updates(weights=np.array([self._weight * self._grid]), dense=dense, rows=rows)

    def _round(
        self, delta: NDArray[np.float32], scale: NDArray[np.float64], block: Updates, name: str
    ) -> NDArray[np.float64]:
        rounded = np.rint(delta * scale.reshape(-1, *([1] * (delta.ndim - 1))))
        if not np.all(np.isfinite(rounded)):
            who = "" if block.clients is None else f" of the clients {block.clients[:8].tolist()}"
            raise UpdateError(f"the update of {name!r} in a block{who} is not finite; refuse it before it is folded")
        return rounded

    def _add_rows(self, table: str, ids: IntArray, sums: IntArray, weights: IntArray) -> None:
        if table in self._rows:
            held = self._rows[table]
            ids, sums, weights = (np.concatenate(pair) for pair in zip(held, (ids, sums, weights), strict=True))
        distinct, inverse = np.unique(ids, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(len(distinct)))
        if len(distinct):
            sums, weights = np.add.reduceat(sums[order], starts, axis=0), np.add.reduceat(weights[order], starts)
        self._rows[table] = (distinct, sums, weights)
