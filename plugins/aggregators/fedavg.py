"""Federated averaging: the weighted mean of the updates.

McMahan et al., 2017, https://arxiv.org/abs/1602.05629, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.aggregation import GridSum
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates

State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class FedAvg:
    r"""The mean of the deltas, :math:`\sum_c w_c \Delta_c / \sum_c w_c`, in one pass and with the same bits for any
    order.

    A row's mean is over the clients that touched it; ``row_weights`` carries their weight.
    """

    weights: Literal["examples", "equal"] = field(
        default="examples", metadata={"help": "weigh clients by the examples of the visit, or all alike"}
    )

    def fold(self, blocks: Iterable[Updates], state: State) -> tuple[Updates, State]:
        total = GridSum()
        for block in blocks:
            total.add(block, block.weights if self.weights == "examples" else (block.weights > 0).astype(np.float64))
        return total.total(), state


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.aggregator(
        "fedavg",
        "fedtower.plugins.aggregators.fedavg:FedAvg",
        summary="the weighted mean of the updates",
        capabilities={"asynchronous": True},
    )
