"""ClientStore: what each client keeps between its visits (device-placed parameters, a transform's residuals)."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import CheckpointError, ShapeMismatch

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class ClientStore:
    """Arrays by name, one entry a client; a client that was never written has the initial value, which is not stored.

    In a simulation this stands for the disks of all devices. Each array lies in a memory-mapped file with a place for
    every client, in which only what was written takes room: a visit costs the same in a population of a hundred and of
    a million. The files are the working copy of one process and vanish with it, however it ends; a checkpoint has a
    snapshot, so that a kill leaves the clients of the last checkpoint, whole.
    """

    def __init__(self, population: int) -> None:
        self._population = population
        self._files: dict[str, _File] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The declared names."""
        return tuple(self._files)

    def declare(self, name: str, initial: FloatArray) -> None:
        """Keep an array called ``name`` for every client; ``initial`` (*shape) is everybody's first value."""
        self._files[name] = _File(self._population, np.asarray(initial, dtype=np.float32))

    def read(self, name: str, clients: IntArray) -> FloatArray:
        """The values of ``clients``, (C, *shape); a copy."""
        file = self._files[name]
        return np.where(
            file.written[clients].reshape(-1, *([1] * file.initial.ndim)), file.values[clients], file.initial[None]
        )

    def write(self, name: str, clients: IntArray, values: FloatArray) -> None:
        """Keep ``values`` (C, *shape) for ``clients``, which are distinct.

        Raises:
            ShapeMismatch: values of another shape than was declared.
            StorageError: the disk is full.
        """
        file = self._files[name]
        if values.shape != (len(clients), *file.initial.shape):
            raise ShapeMismatch(
                f"client state {name!r} was declared with shape {file.initial.shape}, so {len(clients)} clients "
                f"keep {(len(clients), *file.initial.shape)}, but {values.shape} came to be kept"
            )
        file.write(clients, np.ascontiguousarray(values, dtype=np.float32))

    def snapshot(self) -> Mapping[str, NDArray[Any]]:
        """Clients and values of everything written, sorted by client."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, file in self._files.items():
            clients = np.flatnonzero(file.written)
            arrays[f"{name}.clients"] = clients.astype(np.int64)
            arrays[f"{name}.values"] = np.asarray(file.values[clients])
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Hold exactly what a snapshot held."""
        for name in self.names:
            if f"{name}.clients" not in arrays:
                raise CheckpointError(
                    f"the checkpoint holds no client state {name!r}: it was written by a run with another model or "
                    f"other transforms; resume with the recipe it was written with"
                )
            self.declare(name, self._files[name].initial)
            self.write(name, arrays[f"{name}.clients"].astype(np.int64), arrays[f"{name}.values"].astype(np.float32))


class _File:
    """One array of every client, in a file without a name."""

    def __init__(self, population: int, initial: FloatArray) -> None:
        self.initial = initial
        self.written = np.zeros(population, dtype=bool)
        self._folder = Path(tempfile.gettempdir())
        self._record = max(initial.nbytes, 1)
        with storage_errors(self._folder):
            self._file, name = tempfile.mkstemp(dir=self._folder)
            weakref.finalize(self, os.close, self._file)
            Path(name).unlink()
            size = max(population, 1) * self._record
            os.ftruncate(self._file, size)
            room = mmap.mmap(self._file, size, access=mmap.ACCESS_READ)
        self.values: FloatArray = np.ndarray((population, *initial.shape), dtype=np.float32, buffer=room)

    def write(self, clients: IntArray, values: FloatArray) -> None:
        """Write by the file, not by the map: a full disk is then an error, and not a signal that ends the process."""
        with storage_errors(self._folder):
            for client, value in zip(clients.tolist(), values, strict=True):
                os.pwrite(self._file, value.tobytes(), client * self._record)
        self.written[clients] = True
