"""ClientStore: what each client keeps between its visits (device-placed parameters, a transform's residuals)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import CheckpointError, ShapeMismatch

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class ClientStore:
    """Arrays by name, one entry a client; a client that was never written has the initial value, which is not stored.

    In a simulation this stands for the disks of all devices. Memory grows with the clients that were written, not with
    the population (but for four bytes a client and name).
    """

    def __init__(self, population: int) -> None:
        self._population = population
        self._initial: dict[str, FloatArray] = {}
        self._place: dict[str, NDArray[np.int32]] = {}
        self._clients: dict[str, IntArray] = {}
        self._values: dict[str, FloatArray] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The declared names."""
        return tuple(self._initial)

    def declare(self, name: str, initial: FloatArray) -> None:
        """Keep an array called ``name`` for every client; ``initial`` (*shape) is everybody's first value."""
        self._initial[name] = initial
        self._place[name] = np.full(self._population, -1, dtype=np.int32)
        self._clients[name] = np.zeros(0, dtype=np.int64)
        self._values[name] = np.zeros((0, *initial.shape), dtype=np.float32)

    def read(self, name: str, clients: IntArray) -> FloatArray:
        """The values of ``clients``, (C, *shape); a copy."""
        place = self._place[name][clients]
        values = np.repeat(self._initial[name][None], len(clients), axis=0)
        written = place >= 0
        values[written] = self._values[name][place[written]]
        return values

    def write(self, name: str, clients: IntArray, values: FloatArray) -> None:
        """Keep ``values`` (C, *shape) for ``clients``, which are distinct.

        Raises:
            ShapeMismatch: values of another shape than was declared.
        """
        if values.shape != (len(clients), *self._initial[name].shape):
            raise ShapeMismatch(
                f"client state {name!r} was declared with shape {self._initial[name].shape}, so {len(clients)} clients "
                f"keep {(len(clients), *self._initial[name].shape)}, but {values.shape} came to be kept"
            )
        place = self._place[name]
        new = clients[place[clients] < 0]
        if len(new):
            size = len(self._clients[name])
            place[new] = np.arange(size, size + len(new), dtype=np.int32)
            self._clients[name] = np.concatenate([self._clients[name], new])
            if size + len(new) > len(self._values[name]):
                grown = np.zeros((2 * (size + len(new)), *values.shape[1:]), dtype=np.float32)
                grown[:size] = self._values[name][:size]
                self._values[name] = grown
        self._values[name][place[clients]] = values

    def snapshot(self) -> Mapping[str, NDArray[Any]]:
        """Clients and values of everything written, sorted by client."""
        arrays: dict[str, NDArray[Any]] = {}
        for name in self.names:
            order = np.argsort(self._clients[name])
            arrays[f"{name}.clients"] = self._clients[name][order]
            arrays[f"{name}.values"] = self._values[name][: len(order)][order]
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Hold exactly what a snapshot held."""
        for name in self.names:
            if f"{name}.clients" not in arrays:
                raise CheckpointError(
                    f"the checkpoint holds no client state {name!r}: it was written by a run with another model or "
                    f"other transforms; "
                    f"resume with the recipe it was written with"
                )
            self.declare(name, self._initial[name])
            self.write(name, arrays[f"{name}.clients"].astype(np.int64), arrays[f"{name}.values"].astype(np.float32))
