"""One local training step as a pure function: everything that trains on a client runs this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from fedtower.core.control import CONTROL, OWN, is_variate
from fedtower.core.errors import RecipeError, nearest
from fedtower.core.plan import LocalSettings
from fedtower.recsys.local_optimizers import LocalOptimizer, make_optimizer
from fedtower.recsys.models import SharedTower

Tensors = Mapping[str, Tensor]
Loss = Callable[[Tensors, Tensors, Tensors], Tensor]


@dataclass(frozen=True)
class Step:
    """``step(parameters, state, slots, inputs, lr) -> (parameters', state', gradients of the slots, loss)``, pure.

    Rows enter per slot and their gradients leave per slot; who holds the rows sums duplicates and steps them
    (:func:`fedtower.core.rows.step_rows`). The optimiser's state starts anew with every visit. With ``proximal`` the
    loss has FedProx's term, the squared distance from where the visit started (Li et al., 2020,
    https://arxiv.org/abs/1812.06127, equation 2); where that was is kept in the state. With ``control`` gradients are
    corrected by control variates, which are parameters that a step leaves as they are (:mod:`fedtower.core.control`).
    """

    loss: Loss
    optimizer: LocalOptimizer
    proximal: float = 0.0
    frozen: frozenset[str] = frozenset()
    control: bool = False

    def init(self, parameters: Tensors) -> dict[str, Tensor]:
        """The state before the first step of a visit."""
        trained = self._trained(parameters)
        state = self.optimizer.init(trained)
        if self.proximal:
            state |= {f"start/{name}": value for name, value in trained.items()}
        return state

    def __call__(
        self, parameters: Tensors, state: Tensors, slots: Tensors, inputs: Tensors, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One step; nothing that was handed in is changed."""
        trained = self._trained(parameters)
        frozen = {name: value for name, value in parameters.items() if name in self.frozen}

        def loss(trained: Tensors, slots: Tensors) -> Tensor:
            return self.loss({**frozen, **trained}, slots, inputs)

        (gradients, slot_gradients), value = grad_and_value(loss, argnums=(0, 1))(trained, slots)
        if self.control:
            gradients = {name: _corrected(name, gradient, parameters) for name, gradient in gradients.items()}
        start = {name: place for name, place in state.items() if name.startswith("start/")}
        if self.proximal:
            gradients = {
                name: gradient + self.proximal * (trained[name] - start[f"start/{name}"])
                for name, gradient in gradients.items()
            }
        moved, state = self.optimizer.update(trained, gradients, state, lr)
        after = {name: moved.get(name, value) for name, value in parameters.items()}
        return after, {**state, **start}, slot_gradients, value

    def _trained(self, parameters: Tensors) -> dict[str, Tensor]:
        return {name: value for name, value in parameters.items() if name not in self.frozen}


def make_step(tower: SharedTower, local: LocalSettings) -> Step:
    """The step of a tower by a recipe's ``[local]``.

    Raises:
        RecipeError: a loss that the tower does not have, or a frozen parameter that it does not have.
    """
    names = [name for name, _ in tower.named_parameters()]
    for name in local.frozen:
        if name not in names:
            raise RecipeError(
                f"local.frozen names {name!r}, which the model does not have{nearest(name, names)}; "
                f"it has {', '.join(names)}"
            )
    variates = [name for name in names if is_variate(name)]
    controlled = local.control != "none"
    if controlled and not variates:
        raise RecipeError(
            "local.control needs a model with control variates (fedtower.recsys.controls), and this one has none: it "
            "was made for a visit without them"
        )
    frozen = frozenset([*local.frozen, *variates])
    return Step(make_loss(tower, local.loss), make_optimizer(local), local.proximal, frozen, controlled)


def _corrected(name: str, gradient: Tensor, parameters: Tensors) -> Tensor:
    """A gradient with its drift taken out; that of a parameter without variates as it is."""
    if OWN + name not in parameters:
        return gradient
    drift = gradient - parameters[OWN + name]
    return drift + parameters[CONTROL + name] if CONTROL + name in parameters else drift


def make_loss(tower: SharedTower, name: str) -> Loss:
    """``loss(parameters, slots, inputs) -> ()``: the mean over the examples, by weight; 0 for a batch of padding.

    Raises:
        RecipeError: a loss that the tower does not have.
    """
    tower.check_loss(name)
    losses = pure(tower, "losses")

    def loss(parameters: Tensors, slots: Tensors, inputs: Tensors) -> Tensor:
        weight = inputs["weight"]
        return (losses(parameters, slots, inputs, name) * weight).sum() / weight.sum().clamp(min=1.0)

    return loss


def pure(tower: SharedTower, method: str) -> Callable[..., Tensor]:
    """A method of the tower as a function of its parameters: ``f(parameters, *arguments)``; missing ones are the
    tower's.
    """
    called = _Method(tower, method)

    def call(parameters: Tensors, *arguments: object) -> Tensor:
        out: Tensor = functional_call(called, {f"tower.{name}": value for name, value in parameters.items()}, arguments)
        return out

    return call


class _Method(torch.nn.Module):
    """One method of a tower as a module, which is what can be called with other parameters."""

    def __init__(self, tower: SharedTower, method: str) -> None:
        super().__init__()
        self.tower = tower
        self._method = method

    def forward(self, *arguments: Tensor) -> Tensor:
        out: Tensor = getattr(self.tower, self._method)(*arguments)
        return out
