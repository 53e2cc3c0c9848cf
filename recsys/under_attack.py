"""A task under attack: who the attackers of a simulation are, and what they know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks
from fedtower.core.recipe import AttackSection, Recipe
from fedtower.core.registry import Registry
from fedtower.recsys.attacks import Attack, Market, Siege, overrides
from fedtower.recsys.population import Population
from fedtower.recsys.tasks import Histories, Task


def besieged(task: Task, section: AttackSection, registry: Registry, draws: Draws, hooks: Hooks) -> Histories:
    """The task with ``section.share`` of its clients, drawn by the seed, as attackers; ``hooks`` get what they send.

    Only the others are judged, and by ER@K too (:mod:`fedtower.recsys.exposure`).

    Raises:
        RecipeError: the data holds labelled examples or is split in a way that made-up events do not fit, the attack
            has to see the whole cohort and the transport visits it in parts, or nobody is left to be harmed.
    """
    if not isinstance(task, Histories):
        raise RecipeError(
            f"[attack] is on histories of items, and {task.card.name!r} holds labelled examples: leave [attack] out"
        )
    attack: Attack = registry.make("attack", section.part, path="attack")
    if section.share and registry.get("attack", section.part.name).capabilities.get("whole_cohort"):
        _refuse_parts_of_a_cohort(task.recipe, task.num_clients)
    if overrides(attack, "forged") and task.split.kind not in ("leave_one_out", "leave_two_out"):
        raise RecipeError(
            f"attack.name = {section.part.name!r} makes events up, and what is held out of them must be the last ones: "
            f'set data.split = "leave_one_out" or "leave_two_out", not {task.split.kind!r}'
        )
    attackers = np.sort(draws.permutation(task.num_clients, "attackers")[: round(section.share * task.num_clients)])
    if len(attackers) == task.num_clients:
        raise RecipeError(
            f"attack.share = {section.share} makes all {task.num_clients} clients attackers: lower it, for somebody "
            f"has to be harmed"
        )
    siege = Siege(attackers, attack, market_of(task.population, draws))
    hooks.add(siege, f"the attack {section.part.name!r}")
    forged = siege.population(task.population)
    return replace(task, population=forged, split=replace(task.split, population=forged), siege=siege)


def _refuse_parts_of_a_cohort(recipe: Recipe, num_clients: int) -> None:
    """Raise RecipeError unless the transport visits all clients of a cohort together: attackers see them all then."""
    assert recipe.attack is not None
    why = f"attack.name = {recipe.attack.part.name!r} is made of the updates of the whole cohort"
    if recipe.asynchronous is not None or recipe.cohort.over_selection != 1.0:
        section = "[asynchronous]" if recipe.asynchronous is not None else "cohort.over_selection"
        raise RecipeError(f"{why}, and with {section} clients are visited in parts, as they come: leave {section} out")
    size, block = recipe.cohort.part.settings.get("size"), recipe.transport.settings.get("block")
    most = min(size, num_clients) if isinstance(size, int) else num_clients  # where it varies, all may be in it
    if not isinstance(block, int):
        raise RecipeError(
            f"{why}, and the transport {recipe.transport.name!r} has no setting `block` that says how many it visits "
            f'together: set transport.name = "in_process"'
        )
    if block < most:
        raise RecipeError(
            f"{why}, of which transport.block = {block} visits only so many together, and its strength would depend on "
            f"that: set transport.block = {most}, as many as a cohort may have"
        )


def market_of(population: Population, draws: Draws) -> Market:
    """What attackers know. The promoted item is drawn from the third quarter of items by popularity: so rarely touched
    that nobody is shown it, and touched.
    """
    events = population.events(np.arange(population.num_clients, dtype=np.int64))
    touched = np.bincount(events.items, minlength=population.num_items)
    everything = np.argsort(-touched, kind="stable")
    popular = everything[: np.count_nonzero(touched)]
    rare = popular[len(popular) // 2 : max(3 * len(popular) // 4, len(popular) // 2 + 1)]
    promoted = int(rare[int(draws.integers(len(rare), "promoted item"))])
    return Market(everything, promoted, Draws(int(draws.bits("attack"))))
