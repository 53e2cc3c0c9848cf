"""Alternating: an optimiser of two parts, one of which rests while the other is stepped.

FedRep, Collins et al., 2021, https://arxiv.org/abs/2102.07078; :mod:`fedtower.recsys.phases` says which step is whose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtower.recsys.local_optimizers import LocalOptimizer

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Alternating:
    """Steps the parameters in ``own`` where ``head`` () is 1, and the others where it is 0.

    Each part has a state of its own, which rests with it. Both parts' steps are computed, and one is taken: a graph
    without branches runs in every engine, and in lanes that stand in different phases.
    """

    optimizer: LocalOptimizer
    own: frozenset[str]

    def init(self, parameters: Tensors) -> dict[str, Tensor]:
        """The states of both parts."""
        return {
            f"{part}/{name}": value
            for part, held in self._parts(parameters).items()
            for name, value in self.optimizer.init(held).items()
        }

    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, lr: float | Tensor, head: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters and the states after one step."""
        moved, after = dict(parameters), dict[str, Tensor]()
        for part, held in self._parts(parameters).items():
            turn = _turn(part, head)
            mine = {
                name.removeprefix(f"{part}/"): value for name, value in state.items() if name.startswith(f"{part}/")
            }
            stepped, further = self.optimizer.update(held, gradients, mine, lr)
            moved |= {name: torch.where(turn, value, held[name]) for name, value in stepped.items()}
            after |= {f"{part}/{name}": torch.where(turn, value, mine[name]) for name, value in further.items()}
        return moved, after

    def _parts(self, parameters: Tensors) -> dict[str, dict[str, Tensor]]:
        own = {name: value for name, value in parameters.items() if name in self.own}
        return {"own": own, "rest": {name: value for name, value in parameters.items() if name not in own}}


def resting(slopes: Tensors, head: Tensor) -> dict[str, Tensor]:
    """The gradients of rows, which are everybody's: 0 while the head is trained."""
    turn = _turn("rest", head)
    return {name: torch.where(turn, value, torch.zeros_like(value)) for name, value in slopes.items()}


def _turn(part: str, head: Tensor) -> Tensor:
    return head > 0.5 if part == "own" else head < 0.5
