"""ArrivalTimes: when each upload of a window was seen, in a file of its own, so that a kill does not change it.

The journal keeps the order in which uploads were accepted, and no times. Here is one 64-bit float an upload, seconds
after the window was opened, in that order; not a number where nobody was there to see it. It is written without waiting
for the disk: what a machine that stops takes away are times, which a deadline can do without, and never uploads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtower.core.checkpoint import storage_errors

_BYTES = 8


@dataclass
class ArrivalTimes:
    """The times of one window. Uploads up to ``unseen`` came before anybody looked, unless the file knows better."""

    path: Path
    unseen: int
    _known: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole = data[: len(data) // _BYTES * _BYTES]  # a kill may have torn the last one
        self._known = np.frombuffer(whole, dtype="<f8")
        if len(whole) != len(data):
            self.path.write_bytes(whole)

    def seen(self, position: int, seconds: float) -> float:
        """When the upload at ``position``, counted from 1, was seen first; ``seconds`` if that is now."""
        if position <= len(self._known):
            return float(self._known[position - 1])
        when = np.array(np.nan if position <= self.unseen else seconds, dtype="<f8")
        with storage_errors(self.path), self.path.open("ab") as file:
            file.write(when.tobytes())
        return float(when)
