"""One local training step as a pure function: everything that trains on a client runs this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from fedtower.core.control import CONTROL, OWN, is_variate
from fedtower.core.errors import RecipeError, nearest
from fedtower.core.plan import LocalSettings
from fedtower.recsys.alternating import Alternating, resting
from fedtower.recsys.ditto import slopes_of_copies
from fedtower.recsys.local_optimizers import LocalOptimizer, make_optimizer
from fedtower.recsys.models import SharedTower
from fedtower.recsys.own_model import PERSONAL
from fedtower.recsys.phases import HEAD

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
    With an :class:`Alternating` optimiser the input ``head`` says which part is trained, and rows are of the rest. With
    ``ditto`` the client's copies of the shared parameters are stepped too, pulled to where the visit started
    (:mod:`fedtower.recsys.ditto`); the loss is that of the shared model.
    """

    loss: Loss
    optimizer: LocalOptimizer | Alternating
    proximal: float = 0.0
    frozen: frozenset[str] = frozenset()
    control: bool = False
    ditto: float | None = None

    def init(self, parameters: Tensors) -> dict[str, Tensor]:
        """The state before the first step of a visit."""
        trained = self._trained(parameters)
        state = self.optimizer.init(trained)
        if self.proximal or self.ditto is not None:
            state |= {f"start/{name}": value for name, value in _without_copies(trained).items()}
        return state

    def __call__(
        self, parameters: Tensors, state: Tensors, slots: Tensors, inputs: Tensors, lr: float | Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One step; nothing that was handed in is changed."""
        trained = self._trained(parameters)
        fixed = {name: value for name, value in parameters.items() if name in self.frozen}

        def loss(trained: Tensors, slots: Tensors) -> Tensor:
            return self.loss({**fixed, **trained}, slots, inputs)

        single = _without_copies(trained)
        (gradients, slopes), value = grad_and_value(loss, argnums=(0, 1))(single, slots)
        if self.control:
            gradients = {name: _corrected(name, gradient, parameters) for name, gradient in gradients.items()}
        start = {name: place for name, place in state.items() if name.startswith("start/")}
        if self.proximal:
            gradients = {
                name: gradient + self.proximal * (trained[name] - start[f"start/{name}"])
                for name, gradient in gradients.items()
            }
        if self.ditto is not None:
            sent = {name.removeprefix("start/"): place for name, place in start.items()}
            gradients |= slopes_of_copies(lambda mine: loss(mine, slots), trained, sent, self.ditto)
        if isinstance(self.optimizer, Alternating):
            moved, state = self.optimizer.update(trained, gradients, state, lr, inputs[HEAD])
            slopes = resting(slopes, inputs[HEAD])
        else:
            moved, state = self.optimizer.update(trained, gradients, state, lr)
        after = {name: moved.get(name, value) for name, value in parameters.items()}
        return after, {**state, **start}, slopes, value

    def _trained(self, parameters: Tensors) -> dict[str, Tensor]:
        return {name: value for name, value in parameters.items() if name not in self.frozen}


def make_step(tower: SharedTower, local: LocalSettings, on_device: Sequence[str] = ()) -> Step:
    """The step of a tower by a recipe's ``[local]``; ``on_device`` are the parameters that each client has to itself.

    Raises:
        RecipeError: a loss that the tower does not have, a frozen parameter that it does not have, a head where none
            is on the device, control variates or copies that the model was not given.
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
    if local.ditto is not None and not any(name.startswith(PERSONAL) for name in names):
        raise RecipeError(
            "local.ditto needs a model with a personal copy of what it shares (fedtower.recsys.ditto), and this one "
            "has none: it was made for a visit without them"
        )
    frozen = frozenset([*local.frozen, *variates])
    plain = make_optimizer(local)
    optimizer = Alternating(plain, _head(on_device, frozen)) if local.head_first else plain
    return Step(make_loss(tower, local.loss), optimizer, local.proximal, frozen, controlled, local.ditto)


def _head(on_device: Sequence[str], frozen: frozenset[str]) -> frozenset[str]:
    """What FedRep trains first. Raises RecipeError where there is nothing."""
    head = frozenset(on_device) - frozen
    if not head:
        raise RecipeError(
            "local.head_first trains first what each client has to itself, and this model keeps nothing on devices: "
            "name some of its towers in local.on_device, or choose a model that does, such as pfedrec"
        )
    return head


def _without_copies(parameters: Tensors) -> dict[str, Tensor]:
    return {name: value for name, value in parameters.items() if not name.startswith(PERSONAL)}


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
