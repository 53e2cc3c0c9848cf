"""Runtime: the seam that executes local training, a plan and the data of C clients in, updates out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.plan import Plan
from fedtower.core.rows import RowIds
from fedtower.core.updates import Updates

Array = NDArray[np.generic]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """What C clients train on in one visit: fixed shapes, up to S steps each.

    Shape:
        ``clients`` (C,); ``steps`` (C,): how many of the S steps are real; ``examples`` (C,): examples with weight;
        ``inputs[name]`` (C, S, *shape), per-example weights among them; ``slots[name]`` (C, S, *slots): positions within the
        client's own rows; ``row_ids[source]`` jagged: which rows those are; ``rows[source]`` (R, D): their values;
        ``states[name]`` (C, *shape): parameters that live on the device.
    """

    clients: IntArray
    steps: IntArray
    examples: IntArray
    inputs: Mapping[str, Array]
    slots: Mapping[str, IntArray] = field(default_factory=dict)
    row_ids: Mapping[str, RowIds] = field(default_factory=dict)
    rows: Mapping[str, FloatArray] = field(default_factory=dict)
    states: Mapping[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clients)


class Runtime(Protocol):
    """Executes local training. Every runtime runs the same step and gives the same numbers."""

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        """The updates of the clients of ``work``, and what their device parameters have become."""
        ...
