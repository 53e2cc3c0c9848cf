"""FedAdam: Adam on the server, with the mean delta as its gradient.

Reddi et al., 2021, https://arxiv.org/abs/2003.00295, algorithm 2; unless told otherwise with the bias correction of
Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980, which the former leaves out.
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
class Adam:
    r"""``x + lr m / (sqrt(v) + eps)``, the moments ``m`` and ``v`` bias-corrected; without ``correction`` they are not,
    and v is eps^2 at first: with ``eps = 1e-3`` that is FedAdam as its paper has it.
    """

    beta1: float = field(default=0.9, metadata={"help": "decay of the first moment"})
    beta2: float = field(default=0.99, metadata={"help": "decay of the second moment"})
    eps: float = field(default=1e-8, metadata={"help": "added to the root of the second moment"})
    correction: bool = field(default=True, metadata={"help": "correct the moments' bias towards where they start"})

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"server.{name} must be from 0 to below 1, not {getattr(self, name)}")
        if self.eps <= 0:
            raise RecipeError(f"server.eps must be positive, not {self.eps}")

    def init(self, parameters: Parameters) -> State:
        first = {"m": 0.0, "v": 0.0 if self.correction else self.eps**2}
        moments = {
            f"{m}/{name}": np.full_like(value, at) for name, value in parameters.items() for m, at in first.items()
        }
        return {**moments, "steps": np.zeros((), dtype=np.int64)}

    def update(self, parameters: Parameters, delta: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        steps = int(state["steps"]) + 1
        after: dict[str, NDArray[Any]] = {"steps": np.asarray(steps, dtype=np.int64)}
        moved = {}
        for name, value in parameters.items():
            m = self.beta1 * state[f"m/{name}"] + (1 - self.beta1) * delta[name]
            v = self.beta2 * state[f"v/{name}"] + (1 - self.beta2) * delta[name] ** 2
            # A parameter without dimensions would come out of the arithmetic as a scalar, which is no array.
            after[f"m/{name}"], after[f"v/{name}"] = np.asarray(m, np.float32), np.asarray(v, np.float32)
            if self.correction:
                m, v = m / (1 - self.beta1**steps), v / (1 - self.beta2**steps)
            step = m / (np.sqrt(v) + self.eps)
            moved[name] = np.asarray(value + lr * step, np.float32)
        return moved, after


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.server_optimizer(
        "adam", "fedtower.plugins.server_optimizers.adam:Adam", summary="Adam with the mean delta as its gradient"
    )
