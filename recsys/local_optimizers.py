"""A device's optimisers as pure functions: parameters, gradients and state in, parameters and state out.

They give the same numbers as their namesakes in ``torch.optim``, and are made of operations that export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedtower.core.plan import LocalSettings

Tensors = Mapping[str, Tensor]
Lr = float | Tensor


class LocalOptimizer(Protocol):
    """What moves the parameters on a device."""

    def init(self, parameters: Tensors) -> dict[str, Tensor]:
        """The state before the first step."""
        ...

    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, lr: Lr
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters and the state after one step."""
        ...


@dataclass(frozen=True)
class SGD:
    """Gradient descent, ``x - lr g``."""

    def init(self, parameters: Tensors) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, lr: Lr
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step."""
        return {name: value - lr * gradients[name] for name, value in parameters.items()}, {}


@dataclass(frozen=True)
class Momentum:
    """``v = momentum v + g``, ``x - lr v`` (Polyak, 1964)."""

    momentum: float

    def init(self, parameters: Tensors) -> dict[str, Tensor]:
        """Velocities of zero."""
        return {f"v/{name}": torch.zeros_like(value) for name, value in parameters.items()}

    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, lr: Lr
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step."""
        after = {f"v/{name}": self.momentum * state[f"v/{name}"] + gradients[name] for name in parameters}
        return {name: value - lr * after[f"v/{name}"] for name, value in parameters.items()}, after


@dataclass(frozen=True)
class Adagrad:
    """``s = s + g^2``, ``x - lr g / (sqrt(s) + eps)``: Duchi et al., 2011, https://jmlr.org/papers/v12/duchi11a.html."""

    eps: float

    def init(self, parameters: Tensors) -> dict[str, Tensor]:
        """Sums of zero."""
        return {f"s/{name}": torch.zeros_like(value) for name, value in parameters.items()}

    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, lr: Lr
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step."""
        after = {f"s/{name}": state[f"s/{name}"] + gradients[name] * gradients[name] for name in parameters}
        return {
            name: value - lr * gradients[name] / (torch.sqrt(after[f"s/{name}"]) + self.eps)
            for name, value in parameters.items()
        }, after


@dataclass(frozen=True)
class Adam:
    """Bias-corrected first and second moments: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980, algorithm 1.

    The powers of the betas are kept in the state, so that a step needs no counter and no power.
    """

    beta1: float
    beta2: float
    eps: float

    def init(self, parameters: Tensors) -> dict[str, Tensor]:
        """Moments of zero, powers of one."""
        moments = {f"{moment}/{name}": torch.zeros_like(value) for name, value in parameters.items() for moment in "mv"}
        like = next(iter(parameters.values()), torch.zeros(1))
        return {**moments, "beta1": like.new_ones(()), "beta2": like.new_ones(())}

    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, lr: Lr
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step."""
        power1, power2 = state["beta1"] * self.beta1, state["beta2"] * self.beta2
        after: dict[str, Tensor] = {"beta1": power1, "beta2": power2}
        moved = {}
        for name, value in parameters.items():
            gradient = gradients[name]
            m = self.beta1 * state[f"m/{name}"] + (1 - self.beta1) * gradient
            v = self.beta2 * state[f"v/{name}"] + (1 - self.beta2) * gradient * gradient
            moved[name] = value - lr * (m / (1 - power1)) / (torch.sqrt(v / (1 - power2)) + self.eps)
            after[f"m/{name}"], after[f"v/{name}"] = m, v
        return moved, after


def make_optimizer(local: LocalSettings) -> LocalOptimizer:
    """The optimiser of a recipe's ``[local]``."""
    if local.optimizer == "momentum":
        return Momentum(local.momentum)
    if local.optimizer == "adagrad":
        return Adagrad(local.eps)
    if local.optimizer == "adam":
        return Adam(local.beta1, local.beta2, local.eps)
    return SGD()
