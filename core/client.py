"""The client's half of a round: fetch rows, train, and pass the update through the transforms' client sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedtower.core.draws import Draws
from fedtower.core.hooks import Hooks
from fedtower.core.plan import Plan
from fedtower.core.rows import RowIds, RowStore
from fedtower.core.runtime import Runtime, Work
from fedtower.core.store import ClientStore
from fedtower.core.transform import States, Transform, on_client
from fedtower.core.updates import Updates

IntArray = NDArray[np.int64]


class ClientData(Protocol):
    """What the clients hold, made into fixed shapes."""

    def work(self, plan: Plan, clients: IntArray) -> Work:
        """The batches of one visit of each client, and the ids of the rows it needs."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A runtime that also prepares the clients' data, where it trains them: in processes of its own."""

    def prepares(self, data: ClientData) -> ClientData:
        """The same data, prepared there."""
        ...


@dataclass(frozen=True)
class ClientSide:
    """What a client's half of the round is made of."""

    data: ClientData
    runtime: Runtime
    rows: RowStore | None
    transforms: Sequence[Transform]
    store: ClientStore
    hooks: Hooks
    draws: Draws
    device_state: tuple[str, ...] = ()  # names in the store that are parameters of the model

    def declare(self, plan: Plan) -> None:
        """Make room in the store for what the transforms keep on each client."""
        for position, transform in enumerate(self.transforms):
            for name, shape in transform.state(plan).items():
                self.store.declare(f"transforms.{position}.{name}", np.zeros(shape, dtype=np.float32))

    def visit(self, plan: Plan, clients: IntArray) -> Updates:
        """The updates of ``clients`` as they leave their devices; what stays on the devices is written to the store.

        Their metric ``bytes_down`` is what each was sent: the plan's shared parameters, and the rows it asked for.
        """
        work = self.data.work(plan, clients)
        bytes_down = np.full(len(clients), float(plan.nbytes))
        if self.rows is not None:
            fetched = {source: fetch(self.rows, source, needed) for source, needed in work.row_ids.items()}
            for source, needed in work.row_ids.items():
                bytes_down += np.diff(needed.offsets) * 4.0 * fetched[source].shape[1]
            work = replace(work, rows=fetched)
        work = replace(work, states={name: self.store.read(name, clients) for name in self.device_state})

        updates, states = self.hooks.wrap(
            "client_train", lambda: self.runtime.train(plan, work), plan=plan, clients=clients
        )
        kept: Sequence[States] = [
            {name: self.store.read(f"transforms.{position}.{name}", clients) for name in transform.state(plan)}
            for position, transform in enumerate(self.transforms)
        ]
        updates, kept = on_client(self.transforms, updates, kept, self.draws)

        for name, values in states.items():
            self.store.write(name, clients, values)
        for position, state in enumerate(kept):
            for name, values in state.items():
                self.store.write(f"transforms.{position}.{name}", clients, values)
        return replace(updates, metrics={**updates.metrics, "bytes_down": bytes_down})


def fetch(rows: RowStore, source: str, needed: RowIds) -> NDArray[np.float32]:
    """The rows that each client of a block needs, (R, D); those that many need are computed once."""
    distinct, place = np.unique(needed.ids, return_inverse=True)
    return rows.fetch(source, distinct)[place]
