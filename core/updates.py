"""Updates: a block of what C clients send back, stacked along the leading axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import ShapeMismatch, UpdateError

FloatArray = NDArray[np.float32]
WeightArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of one table for C clients, jagged: client ``c`` owns the entries ``offsets[c]:offsets[c + 1]``.

    Shape:
        ``offsets`` (C+1,), ``row_ids`` (R,), ``row_deltas`` (R, D); in a total also ``row_weights`` (R,): the weight
        of the clients that touched each row.
    """

    offsets: IntArray
    row_ids: IntArray
    row_deltas: FloatArray
    row_weights: WeightArray | None = None

    def __post_init__(self) -> None:
        if len(self.row_ids) != len(self.row_deltas) or self.offsets[-1] != len(self.row_ids):
            raise ShapeMismatch(
                f"jagged rows need one delta an id and offsets that end at their number, but there are "
                f"{len(self.row_ids)} ids, "
                f"{len(self.row_deltas)} deltas, and the offsets end at {self.offsets[-1]}"
            )

    @property
    def owners(self) -> IntArray:
        """The position (0 .. C-1) of the client that owns each entry, (R,)."""
        return np.repeat(np.arange(len(self.offsets) - 1, dtype=np.int64), np.diff(self.offsets))

    @property
    def nbytes(self) -> int:
        """Bytes of the ids, the deltas and the offsets as they are sent: ids as 32-bit integers."""
        return 4 * len(self.row_ids) + self.row_deltas.nbytes + 4 * len(self.offsets)

    def slice(self, start: int, stop: int) -> Rows:
        """The rows of clients ``start`` to ``stop``."""
        first, last = self.offsets[start], self.offsets[stop]
        weights = None if self.row_weights is None else self.row_weights[first:last]
        return Rows(
            self.offsets[start : stop + 1] - first, self.row_ids[first:last], self.row_deltas[first:last], weights
        )


@dataclass(frozen=True)
class Updates:
    """What C clients send back (or, with C = 1 and no client, a total).

    Shape:
        ``weights`` (C,); ``dense[name]`` (C, *shape); ``rows[table]`` jagged, see :class:`Rows`; ``clients`` and
        ``rounds`` (C,), both absent in a total; ``metrics[name]`` (C,).

    Raises:
        ShapeMismatch: a leading axis that is not C.
    """

    weights: WeightArray
    dense: Mapping[str, FloatArray] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    clients: IntArray | None = None
    rounds: IntArray | None = None
    metrics: Mapping[str, WeightArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.weights)
        arrays: dict[str, NDArray[Any]] = {
            **self.dense,
            **{f"metrics.{name}": values for name, values in self.metrics.items()},
        }
        arrays |= {name: ids for name, ids in (("clients", self.clients), ("rounds", self.rounds)) if ids is not None}
        for name, array in arrays.items():
            if array.ndim < 1 or len(array) != count:
                raise ShapeMismatch(
                    f"a block of {count} clients needs {name!r} with {count} entries, but its shape is {array.shape}"
                )
        for table, rows in self.rows.items():
            if len(rows.offsets) != count + 1:
                raise ShapeMismatch(
                    f"a block of {count} clients needs {count + 1} offsets for table {table!r}, but it has "
                    f"{len(rows.offsets)}"
                )

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of this block as it would be sent: deltas, row ids, weights (metrics are not counted)."""
        return (
            sum(delta.nbytes for delta in self.dense.values())
            + sum(rows.nbytes for rows in self.rows.values())
            + 8 * len(self)
        )

    def slice(self, start: int, stop: int) -> Updates:
        """The clients ``start`` to ``stop`` of this block."""
        return Updates(
            weights=self.weights[start:stop],
            dense={name: delta[start:stop] for name, delta in self.dense.items()},
            rows={table: rows.slice(start, stop) for table, rows in self.rows.items()},
            clients=None if self.clients is None else self.clients[start:stop],
            rounds=None if self.rounds is None else self.rounds[start:stop],
            metrics={name: values[start:stop] for name, values in self.metrics.items()},
        )


def stack(blocks: Iterable[Updates]) -> Updates:
    """One block of all the clients of ``blocks``, in their order; an empty block when there are none.

    Raises:
        UpdateError: blocks that do not hold the same parameters or tables.
    """
    held = list(blocks)
    if not held:
        return Updates(weights=np.zeros(0))
    first = held[0]
    for block in held[1:]:
        if set(block.dense) != set(first.dense) or set(block.rows) != set(first.rows):
            raise UpdateError(
                f"one cohort's updates must hold the same parameters, but one block holds {sorted(first.dense)} and "
                f"rows of "
                f"{sorted(first.rows)}, and another {sorted(block.dense)} and rows of {sorted(block.rows)}"
            )
    return Updates(
        weights=np.concatenate([block.weights for block in held]),
        dense={name: np.concatenate([block.dense[name] for block in held]) for name in first.dense},
        rows={table: _stack_rows([block.rows[table] for block in held]) for table in first.rows},
        clients=_stack_ids([block.clients for block in held]),
        rounds=_stack_ids([block.rounds for block in held]),
        metrics={name: np.concatenate([block.metrics[name] for block in held]) for name in first.metrics},
    )


def _stack_rows(parts: list[Rows]) -> Rows:
    lengths = np.concatenate([np.diff(rows.offsets) for rows in parts])
    return Rows(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        row_ids=np.concatenate([rows.row_ids for rows in parts]),
        row_deltas=np.concatenate([rows.row_deltas for rows in parts]),
    )


def _stack_ids(parts: list[IntArray | None]) -> IntArray | None:
    present = [ids for ids in parts if ids is not None]
    return np.concatenate(present) if len(present) == len(parts) else None
