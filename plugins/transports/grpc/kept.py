"""KeptOnDevice: what one device keeps of its own between visits: parameters that never leave it, residuals of
transforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import CheckpointError, ShapeMismatch
from fedtower.core.rows import FloatArray, IntArray


@dataclass(frozen=True)
class KeptOnDevice:
    """A :class:`~fedtower.core.store.StateStore` of one client: an array file each, written whole or not at all."""

    folder: Path
    client: int
    _initial: dict[str, FloatArray] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The declared names."""
        return tuple(self._initial)

    def declare(self, name: str, initial: FloatArray) -> None:
        """Keep an array called ``name``; ``initial`` is its value before it was ever written."""
        self._initial[name] = np.asarray(initial, dtype=np.float32)

    def read(self, name: str, clients: IntArray) -> FloatArray:
        """The value, (1, *shape).

        Raises:
            CheckpointError: the file is damaged, or of another model.
        """
        self._check(clients)
        path, initial = self._path(name), self._initial[name]
        if not path.is_file():
            return initial[None].copy()
        try:
            value: NDArray[Any] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{path}, which this device keeps of its own, is damaged: {error}; remove it"
            ) from error
        if value.shape != initial.shape or value.dtype != np.float32 or not np.isfinite(value).all():
            raise CheckpointError(
                f"{path} holds {value.dtype} of shape {value.shape}, and the model keeps {initial.shape} on a "
                f"device: it is of another model; remove it"
            )
        return value[None]

    def write(self, name: str, clients: IntArray, values: FloatArray) -> None:
        """Keep ``values`` (1, *shape)."""
        self._check(clients)
        if not len(clients):
            return
        if values.shape != (1, *self._initial[name].shape):
            raise ShapeMismatch(f"{name!r} was declared with shape {self._initial[name].shape}, not {values.shape[1:]}")
        path = self._path(name)
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            with unfinished.open("wb") as file:
                np.save(file, np.asarray(values[0], order="C"), allow_pickle=False)
            unfinished.replace(path)

    def snapshot(self) -> Mapping[str, NDArray[Any]]:
        """What is kept, by name."""
        one = np.array([self.client], dtype=np.int64)
        return {name: self.read(name, one)[0] for name in self.names}

    def _check(self, clients: IntArray) -> None:
        if any(client != self.client for client in clients.tolist()):
            raise IndexError(
                f"this device keeps what is of client {self.client}, and {clients.tolist()} were asked for"
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '_')}.npy"
