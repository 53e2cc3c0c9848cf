"""Runtime: the seam that executes local training, a plan and the data of C clients in, updates out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtower.core.plan import LocalSettings, Plan
from fedtower.core.rows import RowIds
from fedtower.core.updates import Rows, Updates

Array = NDArray[Any]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """What C clients train on in one visit: fixed shapes, up to S steps each.

    Shape:
        ``clients`` (C,); ``steps`` (C,): how many of the S steps are real; ``examples`` (C,): examples with weight;
        ``inputs[name]`` (C, S, *shape), per-example weights among them; ``slots[name]`` (C, S, *slots): positions
        within the client's own rows; ``row_ids[source]`` jagged: which rows those are; ``rows[source]`` (R, D): their
        values; ``states[name]`` (C, *shape): parameters that live on the device.
    """

    clients: IntArray
    steps: IntArray
    examples: IntArray
    inputs: Mapping[str, Array]
    slots: Mapping[str, IntArray] = field(default_factory=dict)
    row_ids: Mapping[str, RowIds] = field(default_factory=dict)
    rows: Mapping[str, FloatArray] = field(default_factory=dict)
    states: Mapping[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clients)


class Lookup:
    """An input that is looked up when a step asks for its batch: rows of ``table`` at ``places`` (C, S, *places).

    To be used in the place of an array ``(C, S, *places, *shape)`` that would hold each row many times. ``np.asarray``
    makes that array.
    """

    def __init__(self, table: Array, places: IntArray) -> None:
        self.table, self.places = table, places
        self.shape = (*places.shape, *table.shape[1:])
        self.dtype = table.dtype

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, where: Any) -> Array:
        return np.asarray(self.table[self.places[where]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype=dtype)


class Runtime(Protocol):
    """Executes local training of one model. Every runtime runs the same step and gives the same numbers."""

    def train(self, plan: Plan, work: Work) -> tuple[Updates, Mapping[str, FloatArray]]:
        """The updates of the clients of ``work``, and what their device parameters have become."""
        ...


class RuntimeFactory(Protocol):
    """The seam of a runtime plugin: a frozen dataclass of settings that takes a model in."""

    def open(self, model: Any, local: LocalSettings) -> Runtime:
        """The runtime for one model (what it declares, see fedtower.recsys.models) and one kind of visit."""
        ...


def as_updates(
    plan: Plan,
    work: Work,
    parameters: Mapping[str, FloatArray],
    rows: Mapping[str, FloatArray],
    losses: NDArray[np.float64],
) -> Updates:
    """The updates of a block from what its parameters and rows have become: new minus old, weighed by examples, with
    the metrics ``loss`` and ``steps``, how many each client took.

    Shape:
        ``parameters[name]`` (C, *shape), ``rows[source]`` (R, D), ``losses`` (C,)
    """
    return Updates(
        weights=work.examples.astype(np.float64),
        dense={name: parameters[name] - value[None] for name, value in plan.parameters.items()},
        rows={
            source: Rows(needed.offsets, needed.ids, rows[source] - work.rows[source])
            for source, needed in work.row_ids.items()
            if plan.train_rows
        },
        clients=work.clients,
        rounds=np.full(len(work), plan.round, dtype=np.int64),
        metrics={"loss": losses, "steps": work.steps.astype(np.float64)},
    )
