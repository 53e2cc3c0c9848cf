"""Promotion: attackers make up that they love one item, among popular ones, and shout it.

Interactions made up beside popular items as fillers are a bandwagon attack (Mobasher et al., 2007,
https://doi.org/10.1145/1278366.1278372); a longer update is model replacement (Bagdasaryan et al., 2020,
https://arxiv.org/abs/1807.00459).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates
from fedtower.recsys.attacks import Attack, Market
from fedtower.recsys.population import Events

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Promote(Attack):
    """Every so manieth event of an attacker is with the promoted item, the others with some of the most popular ones;
    she trains on that, and sends her update ``scale`` times as long: as it is, the many who draw the item as a negative
    undo it.

    Between two of those events lie so many others that what was touched lately looks like anybody's: a model that sees
    the item in the history learns to name it to those who have it there, and those are attackers.

    Who has touched all items leaves one too few for that: her last event is with the one whose place the promoted item
    took first, or with the promoted item itself where it took none.
    """

    scale: float = field(default=10.0, metadata={"help": "how many times as long the update is sent"})
    every: int = field(default=20, metadata={"help": "one event in so many is with the promoted item"})
    fillers: int = field(default=300, metadata={"help": "of how many of the most popular items the others come first"})

    def __post_init__(self) -> None:
        for name in ("scale", "every", "fillers"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"attack.{name} must be above 0, not {getattr(self, name)}")

    def forged(self, events: Events, market: Market) -> IntArray:
        among = market.popular[market.popular != market.promoted]
        bits = market.draws.bits("fillers", events.clients[:, None], np.arange(len(among))[None, :])
        turn = np.where(np.arange(len(among)) < self.fillers, bits, np.iinfo(np.int64).max)  # the rest as they come
        order = among[np.argsort(turn, axis=1, kind="stable")]
        at, last = events.positions, events.lengths[events.owners] - 2  # the last two are held out, and not trained on
        first = self.every // 2
        mine = (at % self.every == first) & (at < last)
        spare = np.where(first < last, order[events.owners, first % len(among)], market.promoted)
        others = np.where(at < len(among), order[events.owners, at % len(among)], spare)
        return np.where(mine, market.promoted, others)

    def sent(self, updates: Updates, attackers: NDArray[np.bool_]) -> Updates:
        return updates.scaled(np.where(attackers, self.scale, 1.0))


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.attack(
        "promote",
        "fedtower.plugins.attacks.promote:Promote",
        summary="made-up interactions with one item, shouted",
    )
