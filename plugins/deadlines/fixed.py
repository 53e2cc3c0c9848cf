"""A fixed deadline: the same number of seconds for every round."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtower.core.deadline import Arrivals, State
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.registry import Registry


@dataclass(frozen=True)
class Fixed:
    """Every round may take so many ``seconds``; nothing is learnt."""

    seconds: float = field(metadata={"help": "how many seconds a round may take"})

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise RecipeError(f"deadline.seconds must be above 0, not {self.seconds}")

    def init(self) -> State:
        return {}

    def limit(self, state: State) -> float:
        return self.seconds

    def learn(self, state: State, arrivals: Arrivals) -> tuple[State, str]:
        return state, ""


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.deadline(
        "fixed",
        "fedtower.plugins.deadlines.fixed:Fixed",
        summary="the same number of seconds for every round",
        capabilities={"example": {"seconds": 30.0}},
    )
