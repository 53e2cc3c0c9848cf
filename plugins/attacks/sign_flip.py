"""Sign flip: attackers send the opposite of what they learnt, many times as long.

Li et al., 2019, https://arxiv.org/abs/1811.03761 (RSA): the update times a negative constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry
from fedtower.core.updates import Updates
from fedtower.recsys.attacks import Attack


@dataclass(frozen=True)
class SignFlip(Attack):
    """An attacker trains as she should, and sends her update times ``-scale``, shared parameters and rows."""

    scale: float = field(default=100.0, metadata={"help": "how many times as long as the honest update"})

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise RecipeError(f"attack.scale must be above 0, not {self.scale}")

    def sent(self, updates: Updates, attackers: NDArray[np.bool_]) -> Updates:
        return updates.scaled(np.where(attackers, -self.scale, 1.0))


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.attack(
        "sign_flip",
        "fedtower.plugins.attacks.sign_flip:SignFlip",
        summary="the opposite of what was learnt, many times as long",
    )
