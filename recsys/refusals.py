"""Recipes whose parts are each well and cannot be one run: what is refused before anything is trained, and why."""

from __future__ import annotations

from fedtower.core.control import is_variate
from fedtower.core.errors import RecipeError
from fedtower.core.recipe import Recipe
from fedtower.recsys.ditto import PERSONAL
from fedtower.recsys.models import Declared
from fedtower.recsys.tasks import Histories, Labelled, Task


def refuse_half(recipe: Recipe) -> None:
    """Raise RecipeError for a recipe with one half of FedDyn: the clients' without the server's, or the other way."""
    clients, server = recipe.local.control == "feddyn", recipe.server.part.name == "feddyn"
    if clients != server:
        raise RecipeError(
            f"FedDyn has two halves, and this recipe has the {'clients' if clients else 'server'}'s alone: set both "
            f"local.control = 'feddyn' and server.optimizer = 'feddyn', or neither"
        )


def refuse_personal(recipe: Recipe, task: Task) -> None:
    """Raise RecipeError where clients cannot judge models of their own."""
    if not recipe.evaluation.personal:
        return
    if recipe.mode == "deployed":
        raise RecipeError(
            'evaluation.personal = true is for mode = "simulated": devices judge the model that they are sent; set it '
            "to false"
        )
    copies = recipe.local.ditto is not None and isinstance(task, Labelled)
    if not isinstance(task, Histories) and not copies:
        raise RecipeError(
            f"evaluation.personal = true needs held-out items of each client's own, and {task.card.name!r} "
            f"holds examples out for all clients together; set it to false, or local.ditto, whose copies can be judged"
        )


def refuse_unjudged(recipe: Recipe, task: Task, declared: Declared) -> None:
    """Raise RecipeError where models differ from client to client and what is held out belongs to none of them: only of
    classes can it be told which examples are like a client's own.
    """
    own = [name for name in declared.on_device if not is_variate(name)]
    kept = [name for name in own if not name.startswith(PERSONAL)]
    if kept and isinstance(task, Labelled) and recipe.mode == "deployed":
        raise RecipeError(
            f"devices judge labelled examples with the model that they are sent, and {', '.join(kept)} would stay with "
            f'each of them: leave local.on_device out, or set mode = "simulated"'
        )
    if own and isinstance(task, Labelled) and recipe.mode == "simulated" and not task.examples.num_classes:
        raise RecipeError(
            f"each client would keep {', '.join(own)} to itself, and {task.card.name!r} holds examples out for all "
            f"clients together, so nobody could judge the models: leave local.on_device and local.ditto out, or choose "
            f"a data set of histories or of classes"
        )
