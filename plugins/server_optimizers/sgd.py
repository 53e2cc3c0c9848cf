"""Server SGD: the shared parameters move along the mean delta, with momentum if asked.

FedAvg for lr = 1 without momentum; FedAvgM with it (Hsu et al., 2019, https://arxiv.org/abs/1909.06335).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry

Parameters = Mapping[str, NDArray[np.float32]]
State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class SGD:
    r"""``x + lr v`` with ``v = momentum v + delta``."""

    momentum: float = field(default=0.0, metadata={"help": "share of the last step that is kept, from 0 to below 1"})

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"server.momentum must be from 0 to below 1, not {self.momentum}")

    def init(self, parameters: Parameters) -> State:
        return {name: np.zeros_like(value) for name, value in parameters.items()} if self.momentum else {}

    def update(self, parameters: Parameters, delta: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        if self.momentum:
            delta = {name: np.asarray(np.float32(self.momentum) * state[name] + delta[name]) for name in parameters}
            state = dict(delta)
        return {
            name: np.asarray(value + np.float32(lr) * delta[name], np.float32) for name, value in parameters.items()
        }, state


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.server_optimizer(
        "sgd", "fedtower.plugins.server_optimizers.sgd:SGD", summary="along the mean delta, with momentum if asked"
    )
