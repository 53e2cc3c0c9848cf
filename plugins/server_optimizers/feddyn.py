"""FedDyn: the server's half of dynamic regularisation; ``local.control = "feddyn"`` is the clients'.

Acar et al., 2021, https://arxiv.org/abs/2111.04263, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry

Parameters = Mapping[str, NDArray[np.float32]]
State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class FedDyn:
    r"""``x + lr (delta + s)`` with ``s = s + share delta``, where ``share`` of all clients counted.

    The s of the paper is :math:`-h / \alpha`, so that alpha, which is ``local.proximal``, is the clients' alone. With
    ``lr = 1`` these are the paper's steps.
    """

    def init(self, parameters: Parameters) -> State:
        return {f"s/{name}": np.zeros_like(value) for name, value in parameters.items()}

    def update(self, parameters: Parameters, delta: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        return self.counted(1.0).update(parameters, delta, state, lr)

    def counted(self, share: float) -> Counted:
        """What steps after a round in which ``share`` of all clients counted."""
        return Counted(share)


@dataclass(frozen=True)
class Counted(FedDyn):
    """FedDyn for one round."""

    share: float

    def update(self, parameters: Parameters, delta: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        moved, after = {}, {}
        for name, value in parameters.items():
            # A parameter without dimensions would come out of the arithmetic as a scalar, which is no array.
            s = np.asarray(state[f"s/{name}"] + np.float32(self.share) * delta[name], np.float32)
            moved[name] = np.asarray(value + np.float32(lr) * (delta[name] + s), np.float32)
            after[f"s/{name}"] = s
        return moved, after


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.server_optimizer(
        "feddyn",
        "fedtower.plugins.server_optimizers.feddyn:FedDyn",
        summary="the server's half of dynamic regularisation (FedDyn)",
    )
