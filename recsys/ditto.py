"""Ditto: each client trains a model of its own beside the shared one, pulled towards what it was sent.

Li et al., 2021, https://arxiv.org/abs/2012.04221, algorithm 1: the personal model v descends along
``grad F(v) + lambda (v - w)``, w being the shared model as the round sent it, which is trained as if there were no v. A
lambda of 0 is training alone; a great one is the shared model. The paper trains v after w; here both take the same
steps, and v looks at the rows as they are in that step, so that no batch is made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor
from torch.func import grad

from fedtower.core.errors import RecipeError
from fedtower.core.plan import LocalSettings
from fedtower.recsys.beside import beside
from fedtower.recsys.models import Declared
from fedtower.recsys.own_model import PERSONAL, own_view

Tensors = Mapping[str, Tensor]


def with_copies(declared: Declared, local: LocalSettings) -> Declared:
    """The model, where ``local.ditto`` asks for it with a copy on each device of every shared parameter that is
    trained. A client's copy begins as the model does.

    Raises:
        RecipeError: the model keeps parameters on devices already, or has none to share.
    """
    if local.ditto is None:
        return declared
    if declared.on_device:
        raise RecipeError(
            f"local.ditto keeps a personal copy of what is shared, and this model's {', '.join(declared.on_device)} "
            f"would be trained by two models at once: choose one of them (of dssm: model.user_vector = false)"
        )
    shared = {name: value for name, value in declared.shared.named_parameters() if name not in local.frozen}
    if not shared:
        raise RecipeError("local.ditto needs shared parameters that are trained, and this model has none")
    tower = beside(declared.shared, PERSONAL, shared)
    return replace(declared, shared=tower, on_device=tuple(PERSONAL + name for name in shared))


def slopes_of_copies(loss: Callable[[Tensors], Tensor], parameters: Tensors, start: Tensors, pull: float) -> Tensors:
    """The gradient of each personal copy among ``parameters``, ``grad loss(v) + pull (v - start)``.

    ``loss`` takes all parameters of a model; ``start[name]`` is the shared one as it was sent.
    """
    copies = own_view(parameters)
    slopes = grad(lambda mine: loss({**parameters, **mine}))(copies)
    return {PERSONAL + name: slopes[name] + pull * (value - start[name]) for name, value in copies.items()}
