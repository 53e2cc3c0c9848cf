"""FedAdagrad: each parameter's rate falls with the sum of the squares of its mean deltas.

Reddi et al., 2021, https://arxiv.org/abs/2003.00295, algorithm 2.
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
class Adagrad:
    r"""``x + lr m / (sqrt(v) + tau)`` with ``m = beta1 m + (1 - beta1) delta`` and ``v = v + delta^2``; v is tau^2 at
    first.
    """

    beta1: float = field(default=0.0, metadata={"help": "decay of the first moment"})
    tau: float = field(default=1e-3, metadata={"help": "added to the root of the sum, which starts at its square"})

    def __post_init__(self) -> None:
        if not 0 <= self.beta1 < 1:
            raise RecipeError(f"server.beta1 must be from 0 to below 1, not {self.beta1}")
        if not self.tau > 0:
            raise RecipeError(f"server.tau must be positive, not {self.tau}")

    def init(self, parameters: Parameters) -> State:
        moments = {f"m/{name}": np.zeros_like(value) for name, value in parameters.items()}
        return moments | {f"v/{name}": np.full_like(value, self.tau**2) for name, value in parameters.items()}

    def update(self, parameters: Parameters, delta: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        moved, after = {}, {}
        for name, value in parameters.items():
            m = self.beta1 * state[f"m/{name}"] + (1 - self.beta1) * delta[name]
            v = state[f"v/{name}"] + delta[name] ** 2
            # A parameter without dimensions would come out of the arithmetic as a scalar, which is no array.
            after[f"m/{name}"], after[f"v/{name}"] = np.asarray(m, np.float32), np.asarray(v, np.float32)
            moved[name] = np.asarray(value + lr * m / (np.sqrt(v) + self.tau), np.float32)
        return moved, after


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.server_optimizer(
        "adagrad",
        "fedtower.plugins.server_optimizers.adagrad:Adagrad",
        summary="rates that fall with the sum of squared deltas (FedAdagrad)",
    )
