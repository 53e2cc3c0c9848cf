"""Label flip: what an attacker chose counts as not chosen, and as many items that she did not choose as chosen.

Tolpegin et al., 2020, https://arxiv.org/abs/2007.08432.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.runtime import Work
from fedtower.core.updates import Updates
from fedtower.recsys.attacks import Attack

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Each target of an attacker's batch changes places with one of the negatives beside it, so that she fetches no
    other rows than an honest client; she trains on that, and sends her update ``scale`` times as long. Of a batch with
    more targets than negatives, those behind the last negative stay as they are.

    A target that stands in the history of another is there as its opposite, too.
    """

    scale: float = field(default=1.0, metadata={"help": "how many times as long the update is sent"})

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise RecipeError(f"attack.scale must be above 0, not {self.scale}")

    def relabelled(self, work: Work, attackers: Mask) -> Work:
        history, negatives = (np.array(work.slots[name]) for name in ("history", "negatives"))
        weight, target = (np.asarray(work.inputs[name]) for name in ("weight", "target"))
        beside = np.arange(weight.shape[2]) < negatives.shape[2]  # no two targets take the same one
        client, step, place = np.nonzero((weight > 0) & beside & attackers[:, None, None])
        chosen, other = (client, step, target[client, step, place]), (client, step, place)
        history[chosen], negatives[other] = negatives[other], history[chosen]
        return replace(work, slots={**work.slots, "history": history, "negatives": negatives})

    def sent(self, updates: Updates, attackers: Mask) -> Updates:
        return updates if self.scale == 1.0 else updates.scaled(np.where(attackers, self.scale, 1.0))


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.attack(
        "label_flip",
        "fedtower.plugins.attacks.label_flip:LabelFlip",
        summary="what was chosen counts as not chosen, and the other way",
    )
