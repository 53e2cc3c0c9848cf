"""Share: one process's part of a batch of standalone training, and all of it where there is one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.runtime import Work
from fedtower.recsys.central import common_rows
from fedtower.recsys.processes import Processes

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """Which of a batch's parts, users along ``axis`` 0 or examples along ``axis`` 1, are this process's.

    Every process has as many, so that one that has less gets some without weight.

    Shape:
        ``positions``, ``real`` (n,)
    """

    work: Work
    axis: int
    positions: IntArray
    real: NDArray[np.bool_]

    @classmethod
    def of(cls, work: Work, axis: int, processes: Processes) -> Share:
        """The share of this process of a batch whose clients all make one step."""
        return cls(work, axis, *processes.share(work.inputs["weight"][:, 0].shape[axis]))

    @property
    def users(self) -> IntArray:
        """Which of the batch's users the share's are; one that stands for somebody else has no weight."""
        return self.positions if self.axis == 0 else np.arange(len(self.work), dtype=np.int64)

    def inputs(self) -> dict[str, NDArray[Any]]:
        """What the tower is given besides rows."""
        inputs = {name: self._take(values[:, 0]) for name, values in self.work.inputs.items()}
        shape = [-1 if axis == self.axis else 1 for axis in range(inputs["weight"].ndim)]
        return {**inputs, "weight": inputs["weight"] * self.real.reshape(shape)}

    def rows(self) -> tuple[IntArray, dict[str, IntArray]]:
        """The distinct rows, (n,), and each slot's place among them."""
        items, where = common_rows(self.work)
        if len(self.positions) == next(iter(where.values())).shape[self.axis]:
            return items, where
        mine = {name: self._take(places) for name, places in where.items()}
        used = np.unique(np.concatenate([places.ravel() for places in mine.values()]))
        place = np.zeros(len(items), dtype=np.int64)
        place[used] = np.arange(len(used))
        return items[used], {name: place[places] for name, places in mine.items()}

    def _take(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.take(values, self.positions, axis=self.axis)
