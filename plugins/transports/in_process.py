"""The transport of a simulation: the clients are here, visited block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fedtower.core.cohort import Cohort
from fedtower.core.draws import Draws
from fedtower.core.errors import RecipeError
from fedtower.core.hooks import hookimpl
from fedtower.core.plan import Plan
from fedtower.core.registry import Registry
from fedtower.core.transport import Visit, parts_of
from fedtower.core.updates import Updates


@dataclass(frozen=True)
class InProcess:
    """Updates of ``block`` clients at a time; a share of the cohort drawn by the seed can be made to vanish before it
    trains. Where a part of the cohort is enough, who comes first is drawn by the seed.
    """

    block: int = field(
        default=32, metadata={"help": "clients visited together: for memory's sake; it changes no figure"}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "probability that a chosen client vanishes, from 0 to below 1"}
    )

    def __post_init__(self) -> None:
        if self.block < 1:
            raise RecipeError(f"transport.block must be at least 1, not {self.block}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"transport.dropout must be from 0 to below 1, not {self.dropout}")

    def exchange(
        self, plan: Plan, cohort: Cohort, visit: Visit, draws: Draws, deadline: float | None
    ) -> Iterator[Updates]:
        clients = cohort.clients
        if self.dropout:
            clients = clients[draws.uniform("dropout", plan.round, clients) >= self.dropout]
        if cohort.target is not None:
            clients = clients[np.argsort(draws.bits("arrival", plan.round, clients), kind="stable")]
        for part in parts_of(len(clients), self.block, cohort.target):
            yield visit(plan, np.sort(clients[part]))


@hookimpl
def fedtower_register(registry: Registry) -> None:
    registry.transport(
        "in_process", "fedtower.plugins.transports.in_process:InProcess", summary="a simulation: the clients are here"
    )
