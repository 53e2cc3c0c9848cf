"""Aggregator: many updates to one, by folding blocks; and the sum whose bits do not depend on the order of arrival."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import PluginError, UpdateError
from fedtower.core.plan import Plan
from fedtower.core.updates import Rows, Updates, refuse_other_shapes

IntArray = NDArray[np.int64]
State = Mapping[str, NDArray[Any]]

# A weighted delta is rounded to a multiple of this before it is summed, so that what is summed are integers: at 2**-32
# a delta of 1e-6 keeps 12 bits, and a round's total may reach 2**30.
GRID = 2.0**-32
LIMIT = 2.0**62  # of a sum of integers of 64 bits, with room for what the bound on it rounds away


class Aggregator(Protocol):
    """Folds a cohort's blocks into one total: ``weights`` (1,), ``dense[name]`` (1, *shape) and, by table, the mean
    delta of each touched row over the clients that touched it, with the weight of those clients in ``row_weights``.
    """

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        """The total of ``blocks`` and the aggregator's next state. Raises UpdateError when there is nothing to fold."""
        ...


@runtime_checkable
class Instructed(Protocol):
    """An aggregator that has to know what the cohort was asked to do."""

    def instructed(self, plan: Plan) -> Aggregator:
        """What folds the updates that answer this plan. Raises RecipeError for a plan that it has no rule for."""
        ...


@runtime_checkable
class Rooted(Protocol):
    """An aggregator that judges updates by one that the server made itself, from public data of its own."""

    def rooted(self, root: Updates) -> Aggregator:
        """What folds updates of the round in which the server made ``root``, a block of one client."""
        ...


def folded(aggregator: Aggregator, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
    """What the aggregator makes of ``blocks``, with everything in it that they hold.

    Raises:
        PluginError: it leaves a parameter or a table out, which would then never be trained, and nobody would be told.
    """
    held: set[str] = set()

    def noted() -> Iterator[Updates]:
        for block in blocks:
            held.update(block.dense, (f"rows of {table}" for table, rows in block.rows.items() if len(rows.row_ids)))
            yield block

    total, memory = aggregator.fold(noted(), state)
    lost = sorted(held.difference(total.dense, (f"rows of {table}" for table in total.rows)))
    if lost:
        raise PluginError(
            f"the aggregator {type(aggregator).__name__} was given {', '.join(lost)} and gives a total without; it has "
            f"to fold what it is given, or to raise RowsNotSupported where that is rows"
        )
    return total, memory


class GridSum:
    """The weighted sum of updates, exact on a grid: the same bits for any order and any width of blocks.

    Each weighted delta is rounded once to a multiple of ``grid``, and the integers are summed.

    Raises:
        UpdateError: a value that is not finite, a row that a client sends twice, or a sum that could leave the 64-bit
            range.
        ShapeMismatch: clients that do not send what the first ones sent.
    """

    def __init__(self, grid: float = GRID) -> None:
        self._grid = grid
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._weight = 0
        self._dense: dict[str, IntArray] = {}
        self._rows: dict[str, tuple[IntArray, IntArray, IntArray]] = {}
        self._reach: dict[str, float] = {}  # no sum of that name can be larger than this

    def add(self, block: Updates, weights: NDArray[np.float64]) -> None:
        """Take in a block, each client times its weight in ``weights`` (C,), which need not be the block's own."""
        if not len(block):
            return
        refuse_unfit(block, weights)
        self._shapes = block.shapes if self._shapes is None else self._shapes
        refuse_other_shapes(block, self._shapes)

        clients = np.arange(len(block))
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            scale = weights / self._grid
        counted = self._integers("the weights", np.ones(len(block)), scale, clients, block)
        self._weight += int(counted.sum())
        for name, delta in block.dense.items():
            each = self._integers(name, delta, scale, clients, block)
            total = each[0] if len(each) == 1 else each.sum(axis=0)  # a device's block needs no copy
            if name in self._dense:
                self._dense[name] += total
            else:
                self._dense[name] = total
        for table, rows in block.rows.items():
            owners = rows.owners
            refuse_repeated_rows(table, rows, owners, block)
            sums = self._integers(f"rows of {table}", rows.row_deltas, scale[owners], owners, block)
            self._add_rows(table, rows.row_ids, sums, counted[owners])

    def total(self) -> Updates:
        """The weighted mean: dense over all clients, each row over the clients that touched it. A row that only
        clients without weight touched is not in it.
        """
        if self._weight == 0:
            raise UpdateError("there is nothing to average: no client sent an update with a positive weight")
        dense = {name: (total / self._weight).astype(np.float32)[None] for name, total in self._dense.items()}
        rows = {}
        for table, (ids, sums, weights) in self._rows.items():
            mean = (sums / weights[:, None]).astype(np.float32)
            rows[table] = Rows(
                np.array([0, len(ids)], dtype=np.int64), ids, mean, weights.astype(np.float64) * self._grid
            )
        return Updates(weights=np.array([self._weight * self._grid]), dense=dense, rows=rows)

    def _integers(
        self,
        name: str,
        values: NDArray[Any],
        scale: NDArray[np.float64],
        owners: IntArray,
        block: Updates,
    ) -> IntArray:
        """``values`` (n, ...) times ``scale`` (n,), rounded to integers; each belongs to the client at ``owners``
        (n,) of ``block``.
        """
        with np.errstate(invalid="ignore"):  # what is not finite is refused below
            rounded = np.asarray(values * scale.reshape(-1, *([1] * (values.ndim - 1))))
            np.rint(rounded, out=rounded)
            axes = tuple(range(1, values.ndim))
            largest = np.maximum(rounded.max(axis=axes, initial=0), -rounded.min(axis=axes, initial=0))
            reach = np.zeros(len(block))
            np.maximum.at(reach, owners, largest)
        if not np.all(np.isfinite(reach)):
            raise UpdateError(
                f"the update of {name!r} by {block.who(~np.isfinite(reach))} is not finite; refuse it before it is "
                f"folded (a plugin's accept_update), or lower local.lr if it is everybody's"
            )
        # A client adds to a sum once, so the largest values of all clients bound it, however they are divided into
        # blocks.
        self._reach[name] = self._reach.get(name, 0.0) + float(reach.sum())
        if self._reach[name] >= LIMIT:
            raise UpdateError(
                f"the weighted updates of {name!r} are too large to sum exactly: they reach "
                f"{self._reach[name] * self._grid:.3g}, and the limit is {LIMIT * self._grid:.3g}; the largest is of "
                f"{block.who(reach == reach.max())}. Clip them (transform 'clip'), or lower local.lr"
            )
        return rounded.astype(np.int64)

    def _add_rows(self, table: str, ids: IntArray, sums: IntArray, weights: IntArray) -> None:
        weighty = weights > 0
        ids, sums, weights = ids[weighty], sums[weighty], weights[weighty]
        if table in self._rows:
            held = self._rows[table]
            ids, sums, weights = (np.concatenate(pair) for pair in zip(held, (ids, sums, weights), strict=True))
        distinct, inverse = np.unique(ids, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(len(distinct)))
        if len(distinct):
            sums, weights = np.add.reduceat(sums[order], starts, axis=0), np.add.reduceat(weights[order], starts)
        self._rows[table] = (distinct, sums, weights)


def refuse_unfit(block: Updates, weights: NDArray[np.float64]) -> None:
    """Raise UpdateError for a block that is still encoded, or weights, its own or ``weights`` (C,), that are none."""
    if block.encoded:
        raise UpdateError(
            f"{block.who()} sent {sorted(block.encoded)} encoded, and no transform's decode gave them back; the "
            f"transform that encodes must be in the recipe of the server too"
        )
    for given in (block.weights, weights):
        unfit = ~np.isfinite(given) | (given < 0)
        if np.any(unfit):
            raise UpdateError(
                f"weights must be finite and not negative, but those of {block.who(unfit)} are "
                f"{given[unfit][:8].tolist()}; refuse them before they are folded (a plugin's accept_update)"
            )


def refuse_repeated_rows(table: str, rows: Rows, owners: IntArray, block: Updates) -> None:
    """Raise UpdateError for a client that sends a row twice: it would count twice in the row's mean."""
    if np.all((rows.row_ids[1:] > rows.row_ids[:-1]) | (owners[1:] > owners[:-1])):
        return  # sorted within each client, as runtimes leave them
    order = np.lexsort((rows.row_ids, owners))
    ids, owners = rows.row_ids[order], owners[order]
    again = (ids[1:] == ids[:-1]) & (owners[1:] == owners[:-1])
    if np.any(again):
        among = np.bincount(owners[1:][again], minlength=len(block)) > 0
        raise UpdateError(
            f"{block.who(among)} sent a row of {table!r} more than once; the deltas of a row are summed on the client "
            f"(fedtower.core.rows.sum_duplicates)"
        )
