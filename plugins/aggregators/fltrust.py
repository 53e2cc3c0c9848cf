"""FLTrust: each update counts as far as it points where the server's own does, and no longer than that.

Cao et al., 2021, https://arxiv.org/abs/2012.13995.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.aggregation import GridSum, refuse_unfit
from fedtower.core.errors import UpdateError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Rows, Updates, flat

State = Mapping[str, NDArray[Any]]
FloatArray = NDArray[np.float64]

LEAST = 1e-6  # a cosine that is not above this is rounding, and as a weight too small for the grid of sums


@dataclass(frozen=True)
class FLTrust:
    r"""The mean of :math:`(\lVert g \rVert / \lVert \Delta_c \rVert)\, \Delta_c`, weighed by
    :math:`\max(0, \cos(\Delta_c, g))`, where g is the update that the server makes of the plan itself, on public data
    of its own (``rows.public.share``).

    Shared parameters and rows are one vector, in which a row that a client did not touch is 0; a row's mean is over
    those who touched it and are trusted. If nobody is, nothing moves. In one pass, with the same bits for any order.
    """

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        raise UpdateError(
            "fltrust compares updates with one of the server's own, and was given none: whoever folds hands it over "
            "(fedtower.core.aggregation.Rooted)"
        )

    def rooted(self, root: Updates) -> Trusting:
        """What folds the updates of this round."""
        return Trusting(root)


@dataclass(frozen=True)
class Trusting:
    """FLTrust with the server's own update."""

    root: Updates

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        """The total of a cohort."""
        total, trusted, first = GridSum(), False, None
        for block in blocks:
            refuse_unfit(block, block.weights)
            factors, scores = self._judged(block)
            total.add(block.scaled(factors), scores)
            trusted = trusted or bool(np.any(scores > 0))
            first = block if first is None and len(block) else first
        if first is None:
            raise UpdateError("there is nothing to fold: no client sent an update")
        return (total.total() if trusted else _nothing(first)), state

    def _judged(self, block: Updates) -> tuple[FloatArray, FloatArray]:
        """What to multiply each client's update with, and how far it is trusted, both (C,)."""
        lengths, length = block.norms, float(self.root.norms[0])
        known = np.isfinite(lengths)
        moving = known & (lengths > 0) & (length > 0) & (block.weights > 0)
        # What is not finite is left so, for the sum to refuse.
        factors = np.divide(length, lengths, out=np.where(known, 0.0, 1.0), where=moving)
        with np.errstate(invalid="ignore"):
            inner = _inner(block, self.root)
        cosines = np.divide(inner, lengths * length, out=np.zeros(len(block)), where=moving)
        return factors, np.where(cosines > LEAST, cosines, 0.0)


def _inner(block: Updates, root: Updates) -> FloatArray:
    """The inner product of each client's update with the root's, (C,)."""
    products = np.zeros(len(block))
    for name, delta in block.dense.items():
        products += (flat(delta) * flat(root.dense[name]).astype(np.float64)).sum(axis=1)
    for table, part in block.rows.items():
        if table in root.rows and len(root.rows[table].row_ids):
            each = (part.row_deltas * _rows_of(root.rows[table], part.row_ids)).sum(axis=1)
            products += np.bincount(part.owners, weights=each, minlength=len(block))
    return products


def _rows_of(root: Rows, ids: NDArray[np.int64]) -> FloatArray:
    """The root's rows of ``ids`` (R,), (R, D); 0 where it has none. A total's ids are sorted."""
    place = np.minimum(np.searchsorted(root.row_ids, ids), len(root.row_ids) - 1)
    there = root.row_ids[place] == ids
    return np.where(there[:, None], root.row_deltas[place], 0.0).astype(np.float64)


def _nothing(like: Updates) -> Updates:
    """A total that moves nothing: zeros for every shared parameter, and no rows."""
    one = like.slice(0, 1)
    rows = {
        table: Rows(np.zeros(2, dtype=np.int64), part.row_ids[:0], part.row_deltas[:0], np.zeros(0))
        for table, part in one.rows.items()
    }
    dense = {name: np.zeros_like(delta) for name, delta in one.dense.items()}
    return replace(one, weights=np.ones(1), dense=dense, rows=rows, clients=None, rounds=None, metrics={})


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.aggregator(
        "fltrust",
        "fedtower.plugins.aggregators.fltrust:FLTrust",
        summary="updates count as far as they point where the server's own does",
    )
