"""Updates: a block of what C clients send back, stacked along the leading axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import ShapeMismatch
from fedtower.core.jagged import Encoded, pick, refuse_offsets, stack_offsets

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
        size = len(self.row_ids)
        if len(self.row_deltas) != size or (self.row_weights is not None and len(self.row_weights) != size):
            weights = "" if self.row_weights is None else f" and {len(self.row_weights)} weights"
            raise ShapeMismatch(
                f"jagged rows need one delta (and, in a total, one weight) an id, but for {size} ids there are "
                f"{len(self.row_deltas)} deltas{weights}"
            )
        refuse_offsets(self.offsets, size, "jagged rows")

    @property
    def owners(self) -> IntArray:
        """The position (0 .. C-1) of the client that owns each entry, (R,)."""
        return np.repeat(np.arange(len(self.offsets) - 1, dtype=np.int64), np.diff(self.offsets))

    @property
    def sizes(self) -> IntArray:
        """Bytes of each client's rows as they are sent, (C,): 32 bits an id, the deltas, and 32 bits for how many."""
        width = self.row_deltas.itemsize * int(np.prod(self.row_deltas.shape[1:]))
        return np.diff(self.offsets) * (4 + width) + 4

    def slice(self, start: int, stop: int) -> Rows:
        """The rows of clients ``start`` to ``stop``."""
        first, last = self.offsets[start], self.offsets[stop]
        weights = None if self.row_weights is None else self.row_weights[first:last]
        return Rows(
            self.offsets[start : stop + 1] - first, self.row_ids[first:last], self.row_deltas[first:last], weights
        )

    def pick(self, positions: IntArray) -> Rows:
        """The rows of the clients at ``positions``, in that order."""
        offsets, entries = pick(self.offsets, positions)
        weights = None if self.row_weights is None else self.row_weights[entries]
        return Rows(offsets, self.row_ids[entries], self.row_deltas[entries], weights)


@dataclass(frozen=True)
class Updates:
    """What C clients send back (or, with C = 1 and no client, a total).

    Shape:
        ``weights`` (C,); ``dense[name]`` (C, *shape); ``rows[table]`` jagged, see :class:`Rows`; ``clients`` and
        ``rounds`` (C,), both absent in a total; ``metrics[name]`` (C,); ``encoded[name]``: on its way, in place of
        ``dense[name]``, see :class:`fedtower.core.jagged.Encoded`.

    Raises:
        ShapeMismatch: a leading axis that is not C, or a parameter that is there both dense and encoded.
    """

    weights: WeightArray
    dense: Mapping[str, FloatArray] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    clients: IntArray | None = None
    rounds: IntArray | None = None
    metrics: Mapping[str, WeightArray] = field(default_factory=dict)
    encoded: Mapping[str, Encoded] = field(default_factory=dict)

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
        jagged = {f"table {table!r}": rows.offsets for table, rows in self.rows.items()}
        jagged |= {f"the encoded {name!r}": part.offsets for name, part in self.encoded.items()}
        for name, offsets in jagged.items():
            if len(offsets) != count + 1:
                raise ShapeMismatch(
                    f"a block of {count} clients needs {count + 1} offsets for {name}, but it has {len(offsets)}"
                )
        for name in self.encoded.keys() & self.dense.keys():
            raise ShapeMismatch(f"{name!r} is there both dense and encoded, and only one of them can be meant")

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def sizes(self) -> IntArray:
        """Bytes of each client as it would be sent, (C,): deltas, encoded or not, rows, and 64 bits for its weight.
        Ids, rounds and metrics are not counted.
        """
        dense = sum(delta.itemsize * int(np.prod(delta.shape[1:])) for delta in self.dense.values())
        sizes = np.full(len(self), dense + 8, dtype=np.int64)
        for jagged in ([rows.sizes for rows in self.rows.values()], [part.sizes for part in self.encoded.values()]):
            for each in jagged:
                sizes += each
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes of this block as it would be sent; how clients are divided into blocks makes no difference."""
        return int(self.sizes.sum())

    @property
    def norms(self) -> WeightArray:
        """The Euclidean norm of everything that each client sends, dense parameters and rows as one vector, (C,)."""
        squares = np.zeros(len(self))
        for delta in self.dense.values():
            squares += np.square(flat(delta), dtype=np.float64).sum(axis=1)
        for part in self.rows.values():
            each = np.square(flat(part.row_deltas), dtype=np.float64).sum(axis=1)
            squares += np.bincount(part.owners, weights=each, minlength=len(self))
        return np.sqrt(squares)

    def scaled(self, factors: WeightArray, row_factors: WeightArray | None = None) -> Updates:
        """Each client's deltas times its factor, ``factors`` (C,), in double precision and then rounded once; its rows
        times that in ``row_factors`` (C,), if they have factors of their own.
        """
        of_rows = factors if row_factors is None else row_factors
        dense = {name: _times(delta, factors) for name, delta in self.dense.items()}
        rows = {
            table: replace(part, row_deltas=_times(part.row_deltas, of_rows[part.owners]))
            for table, part in self.rows.items()
        }
        return replace(self, dense=dense, rows=rows)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What each client of the block sends: the shape of each delta by name, of one row by ``rows of TABLE``, and of
        what an encoded delta will be by ``NAME in CODEC``.
        """
        dense = {name: delta.shape[1:] for name, delta in self.dense.items()}
        rows = {f"rows of {table}": part.row_deltas.shape[1:] for table, part in self.rows.items()}
        return dense | rows | {f"{name} in {part.codec}": part.shape for name, part in self.encoded.items()}

    def who(self, among: NDArray[np.bool_] | None = None) -> str:
        """The clients of this block, or those of them for which ``among`` (C,) is true, as an error names them.

        >>> Updates(weights=np.ones(3), clients=np.array([5, 7, 9])).who(np.array([False, True, True]))
        'the clients [7, 9]'
        """
        chosen = np.flatnonzero(np.ones(len(self), dtype=bool) if among is None else among)
        if self.clients is None:
            return f"{len(chosen)} clients without an id"
        rest = f" and {len(chosen) - 8} more" if len(chosen) > 8 else ""
        return f"the clients {self.clients[chosen[:8]].tolist()}{rest}"

    def pick(self, positions: IntArray) -> Updates:
        """The clients at ``positions``, in that order; a copy."""
        return Updates(
            weights=self.weights[positions],
            dense={name: delta[positions] for name, delta in self.dense.items()},
            rows={table: rows.pick(positions) for table, rows in self.rows.items()},
            clients=None if self.clients is None else self.clients[positions],
            rounds=None if self.rounds is None else self.rounds[positions],
            metrics={name: values[positions] for name, values in self.metrics.items()},
            encoded={name: part.pick(positions) for name, part in self.encoded.items()},
        )

    def slice(self, start: int, stop: int) -> Updates:
        """The clients ``start`` to ``stop`` of this block; their deltas are not copied."""
        return Updates(
            weights=self.weights[start:stop],
            dense={name: delta[start:stop] for name, delta in self.dense.items()},
            rows={table: rows.slice(start, stop) for table, rows in self.rows.items()},
            clients=None if self.clients is None else self.clients[start:stop],
            rounds=None if self.rounds is None else self.rounds[start:stop],
            metrics={name: values[start:stop] for name, values in self.metrics.items()},
            encoded={name: part.pick(np.arange(start, stop)) for name, part in self.encoded.items()},
        )


def stack(blocks: Iterable[Updates]) -> Updates:
    """One block of all the clients of ``blocks``, in their order; an empty block when there are none. It has the
    metrics, the clients and the rounds that every block has.

    Raises:
        ShapeMismatch: blocks that do not hold the same parameters and tables, in the same shapes.
    """
    held = list(blocks)
    if not held:
        return Updates(weights=np.zeros(0))
    first = held[0]
    for block in held[1:]:
        refuse_other_shapes(block, first.shapes)
    return Updates(
        weights=np.concatenate([block.weights for block in held]),
        dense={name: np.concatenate([block.dense[name] for block in held]) for name in first.dense},
        rows={table: _stack_rows([block.rows[table] for block in held]) for table in first.rows},
        clients=_stack_ids([block.clients for block in held]),
        rounds=_stack_ids([block.rounds for block in held]),
        metrics={
            name: np.concatenate([block.metrics[name] for block in held])
            for name in first.metrics
            if all(name in block.metrics for block in held)
        },
        encoded={name: _stack_encoded([block.encoded[name] for block in held]) for name in first.encoded},
    )


def refuse_other_shapes(block: Updates, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ShapeMismatch, with the clients' ids, unless the clients of ``block`` send just what is named in
    ``shapes``.
    """
    if block.shapes == shapes:
        return
    got = {name: shape for name, shape in block.shapes.items() if shapes.get(name) != shape}
    want = {name: shape for name, shape in shapes.items() if block.shapes.get(name) != shape}
    raise ShapeMismatch(
        f"{block.who()} sent {_shapes_in_words(got)} where others of the cohort sent {_shapes_in_words(want)}; are "
        f"they on an older plan?"
    )


def _shapes_in_words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name!r} with shape {shape}" for name, shape in sorted(shapes.items())) or "nothing"


def flat(deltas: FloatArray) -> FloatArray:
    """``deltas`` (n, *shape) as vectors, (n, P), also where n is 0."""
    return deltas.reshape(len(deltas), int(np.prod(deltas.shape[1:])))


def _times(deltas: FloatArray, factors: WeightArray) -> FloatArray:
    """``deltas`` (n, ...) times ``factors`` (n,)."""
    return (deltas * factors.reshape(-1, *([1] * (deltas.ndim - 1)))).astype(np.float32)


def _stack_rows(parts: list[Rows]) -> Rows:
    return Rows(
        offsets=stack_offsets([rows.offsets for rows in parts]),
        row_ids=np.concatenate([rows.row_ids for rows in parts]),
        row_deltas=np.concatenate([rows.row_deltas for rows in parts]),
    )


def _stack_encoded(parts: list[Encoded]) -> Encoded:
    return Encoded(
        codec=parts[0].codec,
        shape=parts[0].shape,
        offsets=stack_offsets([part.offsets for part in parts]),
        payload=np.concatenate([part.payload for part in parts]),
    )


def _stack_ids(parts: list[IntArray | None]) -> IntArray | None:
    present = [ids for ids in parts if ids is not None]
    return np.concatenate(present) if len(present) == len(parts) else None
