"""One local training step as a pure function: everything that trains on a client runs this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings
from fedtower.recsys.losses import LOSSES
from fedtower.recsys.models import SharedTower

Tensors = Mapping[str, Tensor]
Step = Callable[[Tensors, Tensors, Tensors, float], tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]
Scores = Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensor]]


def make_step(tower: SharedTower, local: LocalSettings) -> Step:
    """``step(parameters, slots, inputs, lr) -> (parameters', gradients of the slots, loss)``, stochastic gradient
    descent.

    Rows enter per slot and their gradients leave per slot; who holds the rows sums duplicates and steps them
    (:func:`fedtower.core.rows.step_rows`).

    Raises:
        RecipeError: a loss that a single client cannot compute.
    """
    differentiate = grad_and_value(make_loss(tower, local.loss), argnums=(0, 1))

    def step(
        parameters: Tensors, slots: Tensors, inputs: Tensors, lr: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        (gradients, slot_gradients), loss = differentiate(parameters, slots, inputs)
        return {name: value - lr * gradients[name] for name, value in parameters.items()}, slot_gradients, loss

    return step


def make_loss(tower: SharedTower, name: str) -> Callable[[Tensors, Tensors, Tensors], Tensor]:
    """``loss(parameters, slots, inputs) -> ()``: the mean over the examples, by weight; 0 for a batch of padding.

    Shape:
        slots: history ``(T, W)``, negatives ``(N, W)``; inputs: target and weight ``(B,)``, user ``(F,)``
    """
    if name not in LOSSES:
        raise RecipeError(
            f"local.loss = {name!r} cannot be trained on clients that are single users: the other items of a user's "
            f"batch "
            f"are items that the same user chose, so its in-batch negatives would be its own positives. Use "
            f"local.loss = "
            f"'sampled_softmax' (or 'bce'), or mode = 'standalone', where a batch holds many users"
        )
    of_examples, scores = LOSSES[name], make_scores(tower)

    def loss(parameters: Tensors, slots: Tensors, inputs: Tensors) -> Tensor:
        positive, negative = scores(parameters, slots, inputs)
        weight = inputs["weight"]
        return (of_examples(positive, negative) * weight).sum() / weight.sum().clamp(min=1.0)

    return loss


def make_scores(tower: SharedTower) -> Scores:
    """``scores(parameters, slots, inputs) -> (positive (B,), negative (B, N))``, each target scored by what came
    before it.
    """
    represent, score = pure(tower, "represent"), pure(tower, "score")

    def scores(parameters: Tensors, slots: Tensors, inputs: Tensors) -> tuple[Tensor, Tensor]:
        history, target = slots["history"], inputs["target"]
        vectors = represent(parameters, history, target, inputs["user"])
        # All slots are scored and the target's is picked by a mask: one product, and no gather in the exported graph.
        own = target[:, None] == torch.arange(history.shape[0], device=history.device)[None, :]
        positive = torch.where(own, score(parameters, vectors, history), 0.0).sum(dim=1)
        return positive, score(parameters, vectors, slots["negatives"])

    return scores


def pure(tower: SharedTower, method: str) -> Callable[..., Tensor]:
    """A method of the tower as a function of its parameters: ``f(parameters, *arguments)``; missing ones are the
    tower's.
    """
    called = _Method(tower, method)

    def call(parameters: Tensors, *arguments: Tensor) -> Tensor:
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
