"""Learned: a model as it stands, wherever it was trained: its tower, its shared parameters, its rows, its clients'
own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtower.core.rows import RowStore
from fedtower.core.store import ClientStore
from fedtower.recsys.models import Declared
from fedtower.recsys.own_model import Personal

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Learned:
    """What evaluation, recommendation and export need of a training."""

    declared: Declared
    parameters: Mapping[str, FloatArray]
    store: ClientStore
    rows: RowStore | None
    tuned: Callable[[IntArray], Personal] | None = None
    """What each client makes of it for itself before it uses it, where the recipe says so."""

    def shared(self) -> dict[str, Tensor]:
        """The shared parameters."""
        return {name: torch.from_numpy(value) for name, value in self.parameters.items()}

    def own(self, clients: IntArray) -> dict[str, Tensor]:
        """The parameters of each of ``clients``, (C, *shape)."""
        return {name: torch.from_numpy(self.store.read(name, clients)) for name in self.declared.on_device}

    def fetch(self, ids: IntArray) -> Tensor:
        """The rows of ``ids`` as devices see them, (n, W)."""
        if self.rows is None:
            raise ValueError("this model has no rows")
        return torch.from_numpy(self.rows.fetch(self.declared.source, ids))
