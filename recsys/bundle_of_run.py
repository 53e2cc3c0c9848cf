"""A run's newest model as a bundle, and what one user's device would have at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from fedtower.core.checkpoint import storage_errors
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import Hooks
from fedtower.core.registry import Registry
from fedtower.recsys.bundle import Bundle, Precision
from fedtower.recsys.export import FORMATS, Subject, export_model, recipe_digest, visit_of
from fedtower.recsys.reranking import Request
from fedtower.recsys.run import load
from fedtower.recsys.tasks import Histories


def export_run(
    folder: Path,
    out: Path,
    registry: Registry,
    *,
    formats: Sequence[str] = FORMATS,
    precisions: Sequence[str] = (),
) -> Bundle:
    """The bundle of the newest checkpoint, in the new folder ``out``.

    Raises:
        ExportError: see :func:`fedtower.recsys.export.export_model`.
    """
    trained = load(folder, registry=registry)
    setting, learned = trained.setting, trained.training.learned()
    recipe = setting.recipe
    subject = Subject(
        name=recipe.model.name,
        declared=learned.declared,
        local=recipe.local,
        visit=visit_of(setting.task, learned.declared, recipe.local),
        recipe=recipe_digest(recipe.to_dict()),
    )
    return export_model(
        subject,
        learned,
        out,
        registry,
        formats=formats,
        precisions=cast(Sequence[Precision], precisions),
        hooks=Hooks(registry.manager),
    )


def write_request(folder: Path, user: str, count: int, path: Path, registry: Registry) -> None:
    """What this user's device is sent, and has, to rank ``count`` candidates: those that the run's index finds.

    Raises:
        RecipeError: the run was on labelled examples.
    """
    trained = load(folder, registry=registry)
    task, learned = trained.setting.task, trained.training.learned()
    if not isinstance(task, Histories):
        raise RecipeError(f"the data {task.card.name!r} holds labelled examples: there are no candidates to rank")
    population = task.population
    client = np.array([population.client_index(user)])
    events = population.events(client)
    found = np.sort(trained.best(user, count)[0])
    request = Request(
        history=learned.fetch(events.items[-task.recipe.local.history_length :]).numpy(),
        user=population.user_features(client)[0],
        candidates=learned.fetch(found).numpy(),
        names=tuple(population.item_name(int(item)) for item in found),
        own={name: value[0].numpy() for name, value in learned.own(client).items()},
    )
    with storage_errors(path.parent):
        request.write(path)
