"""ClientStore: what each client keeps between its visits (device-placed parameters, a transform's residuals)."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import earlier_attachments, storage_errors
from fedtower.core.errors import CheckpointError, ShapeMismatch
from fedtower.core.segments import Segment, add, values_of

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

_INDEX = "clients.json"


class StateStore(Protocol):
    """What a client's visit needs of a store: that of all clients in a simulation, one device's own in deployment."""

    def declare(self, name: str, initial: FloatArray) -> None:
        """Keep an array called ``name`` for every client; ``initial`` (*shape) is everybody's first value."""
        ...

    def read(self, name: str, clients: IntArray) -> FloatArray:
        """The values of ``clients``, (C, *shape); a copy."""
        ...

    def write(self, name: str, clients: IntArray, values: FloatArray) -> None:
        """Keep ``values`` (C, *shape) for ``clients``, which are distinct."""
        ...


class ClientStore:
    """Arrays by name, one entry a client; a client that was never written has the initial value, which is not stored.

    In a simulation this stands for the disks of all devices. Each array lies in a memory-mapped file with a place for
    every client, in which only what was written takes room: a visit costs the same in a population of a hundred and of
    a million. The files are the working copy of one process and vanish with it, however it ends; a checkpoint has what
    is saved, so that a kill leaves the clients of the last checkpoint, whole.
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
        known = file.written[clients]
        if known.all():
            return np.asarray(file.values[clients])
        # Where nothing was written nothing is read: the file has a hole there, and each page of it would be made.
        values = np.empty((len(clients), *file.initial.shape), dtype=np.float32)
        values[known], values[~known] = file.values[clients[known]], file.initial
        return values

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
        """Clients and values of everything written, sorted by client, in memory."""
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
                raise _missing(name)
            clients = arrays[f"{name}.clients"].astype(np.int64)
            self._refuse_strangers(clients)
            self.declare(name, self._files[name].initial)
            self.write(name, clients, arrays[f"{name}.values"].astype(np.float32))

    def save(self, place: Path) -> None:
        """Write what is kept to ``place``, as an attachment of a checkpoint: only what was written since the last time,
        and what that is merged with (see :mod:`fedtower.core.segments`). The rest is shared with the checkpoints
        beside it.
        """
        earlier = earlier_attachments(place)
        index = {
            name: {"shape": file.initial.shape, "segments": file.save(place, earlier)}
            for name, file in self._files.items()
        }
        (place / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def load(self, place: Path) -> None:
        """Hold exactly what was saved to ``place``, whose files have been checked.

        Raises:
            CheckpointError: it is of another model, other transforms, or more clients than there are.
        """
        index = json.loads((place / _INDEX).read_text(encoding="utf-8"))
        for name, file in self._files.items():
            if name not in index:
                raise _missing(name)
            if tuple(index[name]["shape"]) != file.initial.shape:
                raise CheckpointError(
                    f"the checkpoint's client state {name!r} has shape {tuple(index[name]['shape'])}, but this run's "
                    f"has {file.initial.shape}; resume with the recipe it was written with"
                )
        for name in self.names:
            self.declare(name, self._files[name].initial)
            segments = [Segment.open(place / file) for file in index[name]["segments"]]
            for segment in segments:
                self._refuse_strangers(segment.clients)
                for clients, values in values_of(place / segment.file):
                    self._files[name].write(clients, values)
            self._files[name].saved(segments)

    def _refuse_strangers(self, clients: IntArray) -> None:
        newest = int(clients.max(initial=-1))
        if newest >= self._population:
            raise CheckpointError(
                f"the checkpoint holds what client {newest} keeps, but the data has {self._population} clients; bring "
                f"back the data that the run was started with"
            )


class _File:
    """One array of every client, in a file without a name, and the segments that hold it as it was saved."""

    def __init__(self, population: int, initial: FloatArray) -> None:
        self.initial = initial
        self.written = np.zeros(population, dtype=bool)
        self._fresh = np.zeros(population, dtype=bool)  # written since it was saved
        self._segments: list[Segment] = []
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
        if not len(clients):
            return
        if np.any(clients[1:] < clients[:-1]):
            order = np.argsort(clients)
            clients, values = clients[order], values[order]
        content, each = values.reshape(-1).view(np.uint8).data, self.initial.nbytes
        starts = np.flatnonzero(np.diff(clients, prepend=-2) != 1).tolist()  # of neighbours, which go in one piece
        with storage_errors(self._folder):
            for start, stop in zip(starts, [*starts[1:], len(clients)], strict=True):
                _write_at(self._file, content[start * each : stop * each], int(clients[start]) * self._record)
        self.written[clients] = self._fresh[clients] = True

    def save(self, place: Path, earlier: Sequence[Path]) -> list[str]:
        """The files in ``place`` that hold everything, oldest first."""
        segments = add(
            place,
            self._segments,
            earlier,
            np.flatnonzero(self._fresh),
            everything=lambda: np.flatnonzero(self.written),
            write=lambda clients: Segment.write(place, clients, self.initial.shape, lambda some: self.values[some]),
        )
        self.saved(segments)
        return [segment.file for segment in segments]

    def saved(self, segments: list[Segment]) -> None:
        """These hold everything now. A checkpoint that fails after this leaves none to share, and the next one writes
        everything again.
        """
        self._segments = segments
        self._fresh[:] = False


def _write_at(file: int, content: memoryview, place: int) -> None:
    while len(content):
        taken = os.pwrite(file, content, place)
        content, place = content[taken:], place + taken


def _missing(name: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint holds no client state {name!r}: it was written by a run with another model or other "
        f"transforms; resume with the recipe it was written with"
    )
