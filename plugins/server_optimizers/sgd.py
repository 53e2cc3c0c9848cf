"""Server SGD: the shared parameters move along the mean delta, or along a running sum of them.

FedAvg for lr = 1 without momentum; FedAvgM with it (Hsu et al., 2019, https://arxiv.org/abs/1909.06335), looking ahead
as Nesterov, 1983, does, in the form of Sutskever et al., 2013, https://proceedings.mlr.press/v28/sutskever13.html.
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
    r"""``x + lr v`` with ``v = momentum v + delta``; looking ahead, ``x + lr (momentum v + delta)`` with that v."""

    momentum: float = field(default=0.0, metadata={"help": "share of the last step that is kept, from 0 to below 1"})
    nesterov: bool = field(default=False, metadata={"help": "look ahead: step from where the momentum will lead"})

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"server.momentum must be from 0 to below 1, not {self.momentum}")
        if self.nesterov and not self.momentum:
            raise RecipeError("server.nesterov looks to where the momentum will lead: set server.momentum, such as 0.9")

    def init(self, parameters: Parameters) -> State:
        return {f"v/{name}": np.zeros_like(value) for name, value in parameters.items()} if self.momentum else {}

    def update(self, parameters: Parameters, delta: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        kept, rate = np.float32(self.momentum), np.float32(lr)
        step, after = dict(delta), {}
        for name in parameters if self.momentum else ():
            # A parameter without dimensions would come out of the arithmetic as a scalar, which is no array.
            after[f"v/{name}"] = v = np.asarray(kept * state[f"v/{name}"] + delta[name], np.float32)
            step[name] = np.asarray(kept * v + delta[name]) if self.nesterov else v
        moved = {name: np.asarray(value + rate * step[name], np.float32) for name, value in parameters.items()}
        return moved, after


@dataclass(frozen=True)
class FedAvgM(SGD):
    """:class:`SGD` under the name that the field has for it, with the momentum that is usual."""

    momentum: float = field(default=0.9, metadata=SGD.__dataclass_fields__["momentum"].metadata)


@hookimpl
def fedtower_register(registry: Registry) -> None:
    for name, target, summary in (
        ("sgd", "SGD", "along the mean delta, with momentum if asked"),
        ("momentum", "FedAvgM", "sgd with a momentum of 0.9 (FedAvgM)"),
    ):
        registry.server_optimizer(name, f"fedtower.plugins.server_optimizers.sgd:{target}", summary=summary)
