"""Recipes whose parts are each well and cannot be one run: what is refused before anything is trained, and why."""

from __future__ import annotations

from fedtower.core.errors import RecipeError
from fedtower.core.recipe import Recipe
from fedtower.recsys.models import Declared
from fedtower.recsys.own_model import PERSONAL, is_own
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
    if not isinstance(task, Labelled) or task.examples.num_classes:
        return
    copies = recipe.mode == "simulated" or recipe.evaluation.personal
    own = [name for name in declared.on_device if is_own(name) or (copies and name.startswith(PERSONAL))]
    if own:
        raise RecipeError(
            f"each client would keep {', '.join(own)} to itself, and {task.card.name!r} holds examples out for all "
            f"clients together, so nobody could judge the models: leave local.on_device and local.ditto out, or choose "
            f"a data set of histories or of classes"
        )
