"""The only place where shared parameters change: ServerState, the ServerOptimizer seam, and one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.control import moved, without_variates
from fedtower.core.errors import ShapeMismatch
from fedtower.core.plan import RowSettings
from fedtower.core.rows import RowStore
from fedtower.core.updates import Rows, Updates

Parameters = Mapping[str, NDArray[np.float32]]
State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ServerState:
    """All that the next round needs, or names: ``generation`` says which state of the tables belongs to it."""

    round: int
    parameters: Parameters
    optimizer: State = field(default_factory=dict)
    aggregator: State = field(default_factory=dict)
    generation: int = 0
    accountant: State = field(default_factory=dict)
    deadline: State = field(default_factory=dict)
    transport: State = field(default_factory=dict)
    download: State = field(default_factory=dict)


class ServerOptimizer(Protocol):
    """The mean delta of a round as a pseudo-gradient: Reddi et al., 2021, https://arxiv.org/abs/2003.00295."""

    def init(self, parameters: Parameters) -> State:
        """The state before the first round."""
        ...

    def update(self, parameters: Parameters, delta: Parameters, state: State, lr: float) -> tuple[Parameters, State]:
        """The next parameters and state; ``delta`` points downhill."""
        ...


@runtime_checkable
class Counting(Protocol):
    """An optimiser that has to know which share of all clients counted in a round."""

    def counted(self, share: float) -> ServerOptimizer:
        """What steps after such a round, from the same state."""
        ...


class PublicTraining(Protocol):
    """Trains the rows of the store on public data of the cloud's own."""

    def train(self, round: int, parameters: Parameters, lr_scale: float) -> None:
        """This round's share of it, with the shared parameters as they stand; those do not move."""
        ...


@dataclass(frozen=True)
class Schedule:
    """The share of the learning rates in force at a round: 1 throughout, or falling linearly to ``to`` in the last
    round.
    """

    decay: Literal["none", "linear"]
    to: float
    rounds: int

    def __call__(self, round: int) -> float:
        """The factor of round 1 .. ``rounds``.

        >>> Schedule("linear", to=0.1, rounds=10)(10)
        0.1
        """
        if self.decay == "none" or self.rounds <= 1:
            return 1.0
        return 1.0 - (1.0 - self.to) * (min(round, self.rounds) - 1) / (self.rounds - 1)


def step(
    state: ServerState,
    total: Updates,
    optimizer: ServerOptimizer,
    store: RowStore | None,
    *,
    lr: float,
    lr_scale: float,
    rows: RowSettings,
    public: PublicTraining | None = None,
    share: float = 1.0,
) -> ServerState:
    """The state after one round: the optimiser moves the shared parameters, the store its rows; ``public`` moves them
    in its stead where ``rows.train`` says so. ``share`` of all clients counted, which is how far control variates go.
    """
    delta = {name: value[0] for name, value in total.dense.items()}
    for name, parameter in state.parameters.items():
        if name not in delta or delta[name].shape != parameter.shape:
            got = delta[name].shape if name in delta else "nothing"
            raise ShapeMismatch(
                f"the total of round {state.round + 1} must hold {name!r} with shape {parameter.shape}, not {got}"
            )
    trained, memory = optimizer.update(without_variates(state.parameters), delta, state.optimizer, lr * lr_scale)
    after = {**trained, **moved(state.parameters, delta, share)}
    parameters = {name: after[name] for name in state.parameters}
    if store is not None and total.rows and rows.train == "device_updates":
        weight = float(total.weights[0])
        store.apply(
            {table: (part.row_ids, averaged(part, rows.average, weight)) for table, part in total.rows.items()},
            lr_scale,
        )
    if public is not None and rows.train == "public":
        public.train(state.round + 1, parameters, lr_scale)
    generation = 0 if store is None else store.generation
    return replace(state, round=state.round + 1, parameters=parameters, optimizer=memory, generation=generation)


def averaged(rows: Rows, average: Literal["cohort", "touched"], weight: float) -> NDArray[np.float32]:
    """The row deltas of a total, over the clients that touched each row or over the whole cohort of weight
    ``weight``.
    """
    if average == "touched" or rows.row_weights is None:
        return rows.row_deltas
    return (rows.row_deltas * (rows.row_weights / weight)[:, None]).astype(np.float32)
