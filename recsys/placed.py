"""Placed: a model with more of its tower on the devices than it declares, as a recipe chooses.

FedPer, Arivazhagan et al., 2019, https://arxiv.org/abs/1912.00818: base layers are shared, personalisation layers stay
with each client. Both are trained together, unless ``local.head_first`` says otherwise (FedRep).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedtower.core.errors import RecipeError, nearest
from fedtower.core.plan import LocalSettings
from fedtower.recsys.models import Declared, ExampleSchema, Schema, SequenceTower


def placed(declared: Declared, local: LocalSettings, schema: Schema | ExampleSchema) -> Declared:
    """The model, with the towers that ``local.on_device`` names, or their parameters, on the devices too.

    Raises:
        RecipeError: there is no such tower, it is frozen, nothing would be left to share, or a score would need it.
    """
    names = [name for name, _ in declared.shared.named_parameters()]
    chosen = {name for tower in local.on_device for name in _within(tower, names)}
    if not chosen:
        return declared
    frozen = sorted(chosen & set(local.frozen))
    if frozen:
        raise RecipeError(
            f"local.on_device and local.frozen both name {', '.join(frozen)}: what nobody trains is the same on every "
            f"device; leave it out of one of them"
        )
    more = tuple(name for name in names if name in chosen and name not in declared.on_device)
    moved = replace(declared, on_device=(*declared.on_device, *more))
    if not moved.parameters() and not moved.tables:
        raise RecipeError(
            f"local.on_device leaves nothing to share: the model has no rows, and all of its parameters "
            f"({', '.join(names)}) would stay on the devices; name fewer"
        )
    if isinstance(schema, Schema):
        _refuse_in_scores(moved, schema)
    return moved


def _within(tower: str, names: Sequence[str]) -> list[str]:
    """The parameters of a tower, or the one of that name."""
    found = [name for name in names if name == tower or name.startswith(f"{tower}.")]
    if not found:
        towers = list(dict.fromkeys([*(name.partition(".")[0] for name in names), *names]))
        raise RecipeError(
            f"local.on_device names {tower!r}, which the model does not have{nearest(tower, towers)}; there are "
            f"{', '.join(towers)}"
        )
    return found


def _refuse_in_scores(declared: Declared, schema: Schema) -> None:
    """Raise RecipeError where the score of a user's vector needs what lives on her device: whoever ranks has the vector
    and the rows, in evaluation, in an index and in a list for many users at once.
    """
    tower = declared.shared
    assert isinstance(tower, SequenceTower)
    rows, user = torch.zeros(2, declared.cloud.width), torch.zeros(schema.num_user_features)
    with torch.no_grad():
        vectors = tower.represent(rows, torch.tensor([2]), user)
    own = {name: value for name, value in tower.named_parameters() if name in declared.on_device}
    scores = tower.score(vectors, rows).sum()
    slopes = torch.autograd.grad(scores, list(own.values()), allow_unused=True) if scores.requires_grad else ()
    needed = [name for name, slope in zip(own, slopes, strict=False) if slope is not None]
    if needed:
        raise RecipeError(
            f"{', '.join(needed)} cannot live on devices: items are scored with it after a user's vector is made, and "
            f"ranking has no more of her than that vector. Place what makes the vector, or let represent() put "
            f"these numbers into it, as the model pfedrec does"
        )
