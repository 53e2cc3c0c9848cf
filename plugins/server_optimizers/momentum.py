"""FedAvgM: the server moves along a running sum of the mean deltas.

Hsu et al., 2019, https://arxiv.org/abs/1909.06335; looking ahead as Nesterov, 1983, does, in the form of
Sutskever et al., 2013, https://proceedings.mlr.press/v28/sutskever13.html.
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
class Momentum:
    r"""``x + lr v`` with ``v = momentum v + delta``; looking ahead, ``x + lr (momentum v + delta)`` with that v."""

    momentum: float = field(default=0.9, metadata={"help": "share of the last step that is kept, from 0 to below 1"})
    nesterov: bool = field(default=False, metadata={"help": "look ahead: step from where the momentum will lead"})

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"server.momentum must be from 0 to below 1, not {self.momentum}")

    def init(self, parameters: Parameters) -> State:
        return {f"v/{name}": np.zeros_like(value) for name, value in parameters.items()}

    def update(self, parameters: Parameters, delta: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        kept, rate = np.float32(self.momentum), np.float32(lr)
        moved, after = {}, {}
        for name, value in parameters.items():
            # A parameter without dimensions would come out of the arithmetic as a scalar, which is no array.
            v = np.asarray(kept * state[f"v/{name}"] + delta[name], np.float32)
            step = kept * v + delta[name] if self.nesterov else v
            moved[name], after[f"v/{name}"] = np.asarray(value + rate * step, np.float32), v
        return moved, after


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.server_optimizer(
        "momentum",
        "fedtower.plugins.server_optimizers.momentum:Momentum",
        summary="along a running sum of the mean deltas (FedAvgM)",
    )
